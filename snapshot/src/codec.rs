//! Values to bytes and back (postcard). What comes back was bounded before and must fill the bytes exactly.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::MAX_STATE;

/// Why bytes are no value, or a value cannot be bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// More than [`MAX_STATE`].
    #[error("state of {0} bytes is longer than {MAX_STATE}")]
    TooLong(usize),
    /// Not the form of the type.
    #[error("state is malformed: {0}")]
    Malformed(String),
    /// Bytes behind the value.
    #[error("state has {0} bytes too many")]
    Trailing(usize),
}

/// The bytes of a value.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    let bytes =
        postcard::to_stdvec(value).map_err(|error| CodecError::Malformed(error.to_string()))?;
    match bytes.len() {
        0..=MAX_STATE => Ok(bytes),
        length => Err(CodecError::TooLong(length)),
    }
}

/// The value of bytes. No length in them is believed: memory is taken for what is there.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    match decode_front(bytes)? {
        (value, []) => Ok(value),
        (_, more) => Err(CodecError::Trailing(more.len())),
    }
}

/// The same of a value at the front of bytes, and what is behind it.
pub fn decode_front<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, &[u8]), CodecError> {
    if bytes.len() > MAX_STATE {
        return Err(CodecError::TooLong(bytes.len()));
    }
    postcard::take_from_bytes(bytes).map_err(|error| CodecError::Malformed(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Value = (Vec<u64>, Option<String>, Vec<(u8, Vec<u8>)>);

    #[test]
    fn what_is_too_long_or_has_more_behind_is_refused() {
        let bytes = encode(&7u8).unwrap();
        assert_eq!(decode::<u8>(&bytes), Ok(7));
        assert_eq!(decode::<u8>(&[7, 0]), Err(CodecError::Trailing(1)));
        assert_eq!(decode_front::<u8>(&[7, 0]), Ok((7, &[0][..])));
        let long = vec![0u8; MAX_STATE + 1];
        assert!(matches!(decode::<u8>(&long), Err(CodecError::TooLong(_))));
        assert!(matches!(encode(&long), Err(CodecError::TooLong(_))));
    }

    #[test]
    fn a_length_is_not_believed() {
        // 2^63 elements announced, none there.
        let huge = [0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1];
        assert!(decode::<Vec<u64>>(&huge).is_err());
        assert!(decode::<String>(&huge).is_err());
    }

    proptest! {
        #[test]
        fn there_and_back(value: Value) {
            prop_assert_eq!(decode::<Value>(&encode(&value).unwrap()).unwrap(), value);
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = decode::<Value>(&bytes);
        }
    }
}
