//! Reading JSON with errors that name the field at fault.

use serde::de::DeserializeOwned;

/// JSON that does not have the form asked for.
#[derive(Debug, thiserror::Error)]
#[error("{}{source}", if field.is_empty() { String::new() } else { format!("{field}: ") })]
pub struct JsonError {
    /// Path of the value at fault, such as `drives[0].is_read_only`. Empty for the document as a whole.
    pub field: String,
    /// What is wrong with it, and the line and column.
    pub source: serde_json::Error,
}

/// Reads one JSON document that fills all of `bytes`.
pub fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, JsonError> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        // The path of the document itself is written as a lone dot.
        let field = Some(error.path().to_string()).filter(|path| path != ".");
        JsonError {
            field: field.unwrap_or_default(),
            source: error.into_inner(),
        }
    })?;
    deserializer.end().map_err(|source| JsonError {
        field: String::new(),
        source,
    })?;
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::parse;
    use crate::types::MachineConfig;

    fn error(text: &str) -> String {
        parse::<MachineConfig>(text.as_bytes())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn errors_name_the_field() {
        assert_eq!(
            error(r#"{"mem_size_mib": 128}"#),
            "missing field `vcpu_count` at line 1 column 21"
        );
        assert!(
            error(r#"{"vcpu_count": 1, "mem_size_mib": "big"}"#)
                .starts_with("mem_size_mib: invalid type: string \"big\", expected u64")
        );
        assert!(
            error(r#"{"vcpu_count": 300, "mem_size_mib": 1}"#)
                .starts_with("vcpu_count: invalid value: integer `300`")
        );
        assert!(error(r#"{"vcpus": 1}"#).contains("unknown field `vcpus`"));
        assert!(error("").starts_with("EOF while parsing"));
        assert!(
            error(r#"{"vcpu_count": 1, "mem_size_mib": 1} {}"#).starts_with("trailing characters")
        );
    }
}
