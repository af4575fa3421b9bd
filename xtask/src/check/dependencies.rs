//! Which crate of ours may use which: the column "may use" of ARCHITECTURE.md.

use anyhow::{Context, Result};
use serde_json::Value;

/// What a crate may use of ours.
enum May {
    Use(&'static [&'static str]),
    UseAll,
}

fn rule(package: &str) -> Option<May> {
    Some(match package {
        "lepton-api" | "lepton-hostio" | "lepton-snapshot" | "lepton-agent" | "xtask" => {
            May::Use(&[])
        }
        "lepton-jailer" => May::Use(&["lepton-hostio"]),
        "lepton-devices" => May::Use(&["lepton-hostio", "lepton-snapshot"]),
        "lepton-vmm" => May::Use(&[
            "lepton-api",
            "lepton-devices",
            "lepton-snapshot",
            "lepton-hostio",
        ]),
        "lepton" => May::Use(&["lepton-api", "lepton-agent"]),
        "lepton-tests" | "lepton-benches" | "lepton-fuzz" => May::UseAll,
        _ => return None,
    })
}

/// What in cargo's metadata is against the rules, one line each.
///
/// Crates used by tests only (dev-dependencies) are free.
pub fn violations(metadata: &[u8]) -> Result<Vec<String>> {
    let metadata: Value = serde_json::from_slice(metadata).context("cargo metadata is not JSON")?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata lists no packages")?;
    let mut found = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let Some(rule) = rule(name) else {
            found.push(format!("{name} has no line in the table of crates"));
            continue;
        };
        let May::Use(allowed) = rule else {
            continue;
        };
        let used = package["dependencies"]
            .as_array()
            .map(Vec::as_slice)
            .unwrap_or_default();
        for dependency in used {
            let ours = dependency["path"].is_string();
            let for_tests = dependency["kind"].as_str() == Some("dev");
            let used = dependency["name"].as_str().unwrap_or_default();
            if ours && !for_tests && !allowed.contains(&used) {
                found.push(format!("{name} must not use {used}"));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metadata(package: &str, dependency: &str) -> Vec<u8> {
        format!(r#"{{"packages":[{{"name":"{package}","dependencies":[{dependency}]}}]}}"#)
            .into_bytes()
    }

    #[test]
    fn the_table_is_kept() {
        let hostio = r#"{"name":"lepton-hostio","path":"/x","kind":null}"#;
        let vmm = r#"{"name":"lepton-vmm","path":"/x","kind":"build"}"#;
        assert!(
            violations(&metadata("lepton-devices", hostio))
                .unwrap()
                .is_empty()
        );
        assert_eq!(
            violations(&metadata("lepton-api", hostio)).unwrap(),
            ["lepton-api must not use lepton-hostio"]
        );
        assert_eq!(
            violations(&metadata("lepton-devices", vmm)).unwrap().len(),
            1
        );
        assert!(
            violations(&metadata("lepton-tests", vmm))
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn tests_and_other_peoples_crates_are_free() {
        let for_tests = r#"{"name":"lepton-vmm","path":"/x","kind":"dev"}"#;
        let foreign = r#"{"name":"clap","path":null,"kind":null}"#;
        for dependency in [for_tests, foreign] {
            assert!(
                violations(&metadata("lepton-api", dependency))
                    .unwrap()
                    .is_empty()
            );
        }
    }

    #[test]
    fn a_crate_without_a_rule_is_told() {
        assert_eq!(
            violations(&metadata("lepton-extra", "")).unwrap(),
            ["lepton-extra has no line in the table of crates"]
        );
    }
}
