//! Which crate of ours may use which, the column "may use" of ARCHITECTURE.md; and what others' crates must be: not one
//! with a known defect, and of a licence that `deny.toml` allows.

use anyhow::{Context, Result};
use serde_json::Value;

/// What a crate may use of ours.
enum May {
    Use(&'static [&'static str]),
    UseAll,
}

fn rule(package: &str) -> Option<May> {
    Some(match package {
        "lepton-api" | "lepton-hostio" | "lepton-snapshot" | "lepton-identity" | "xtask" => {
            May::Use(&[])
        }
        "lepton-agent" => May::Use(&["lepton-identity"]),
        "lepton-jailer" => May::Use(&["lepton-hostio"]),
        "lepton-devices" => May::Use(&["lepton-hostio", "lepton-snapshot"]),
        "lepton-vmm" => May::Use(&[
            "lepton-api",
            "lepton-devices",
            "lepton-snapshot",
            "lepton-hostio",
            "lepton-identity",
        ]),
        "lepton" => May::Use(&["lepton-api", "lepton-agent"]),
        "lepton-tests" | "lepton-benches" | "lepton-hot-paths" | "lepton-fuzz" => May::UseAll,
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

/// Versions in which a defect that a guest or an image could use was mended: crate, first good version, the defect.
/// From the RustSec database; the last is in GitHub's alone.
const FLOORS: [(&str, [u64; 3], &str); 6] = [
    ("kvm-ioctls", [0, 19, 1], "RUSTSEC-2024-0428"),
    (
        "vm-memory",
        [0, 12, 2],
        "RUSTSEC-2023-0056 (CVE-2023-41051) and RUSTSEC-2020-0157 (CVE-2020-13759)",
    ),
    (
        "vmm-sys-util",
        [0, 12, 0],
        "RUSTSEC-2024-0002 (CVE-2023-50711)",
    ),
    (
        "versionize",
        [0, 1, 10],
        "RUSTSEC-2023-0030 (CVE-2023-28448)",
    ),
    ("protobuf", [3, 7, 2], "RUSTSEC-2024-0437 (CVE-2025-53605)"),
    ("linux-loader", [0, 8, 1], "GHSA-52h2-m2cf-9jh6"),
];

/// Which crates have a licence that `deny` (deny.toml) does not allow, one line each.
pub fn licences(metadata: &[u8], deny: &str) -> Result<Vec<String>> {
    let metadata: Value = serde_json::from_slice(metadata).context("cargo metadata is not JSON")?;
    // An array of strings is the same in TOML and in JSON.
    let allowed = deny
        .lines()
        .find_map(|line| line.strip_prefix("allow = "))
        .context("deny.toml has no line of allowed licences")?;
    let allowed: Vec<String> =
        serde_json::from_str(allowed).context("deny.toml: allowed licences")?;
    let packages = metadata["packages"]
        .as_array()
        .context("cargo metadata lists no packages")?;
    let mut found = Vec::new();
    for package in packages {
        let name = package["name"].as_str().unwrap_or_default();
        let licence = package["license"].as_str().unwrap_or_default();
        let expression = spdx::Expression::parse_mode(licence, spdx::ParseMode::LAX);
        let is_allowed = |wanted: &spdx::LicenseReq| {
            let id = wanted.license.id().map(|id| id.name);
            allowed.iter().any(|allowed| id == Some(allowed))
        };
        if !expression.is_ok_and(|expression| expression.evaluate(is_allowed)) {
            found.push(format!(
                "{name}: licence {licence:?} is none that deny.toml allows"
            ));
        }
    }
    Ok(found)
}

/// What in a `Cargo.lock` is older than its floor, one line each.
pub fn below_floor(lock: &str) -> Vec<String> {
    let value = |line: &str, key: &str| -> Option<String> {
        let text = line.strip_prefix(key)?.strip_prefix(" = \"")?;
        Some(text.strip_suffix('"')?.to_owned())
    };
    let mut found = Vec::new();
    let mut name = String::new();
    for line in lock.lines() {
        if let Some(text) = value(line, "name") {
            name = text;
        }
        let Some(version) = value(line, "version") else {
            continue;
        };
        for (package, floor, defect) in FLOORS {
            // Numbers alone count: a pre-release of a floor does not exist.
            let mut numbers = version
                .split(['.', '-', '+'])
                .map(|part| part.parse().unwrap_or(0));
            let version_numbers = [(); 3].map(|()| numbers.next().unwrap_or(0));
            if package == name && version_numbers < floor {
                let [major, minor, patch] = floor;
                found.push(format!(
                    "{name} {version} has {defect}: it must be at least {major}.{minor}.{patch}"
                ));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock(package: &str, version: &str) -> String {
        format!("[[package]]\nname = \"{package}\"\nversion = \"{version}\"\n")
    }

    #[test]
    fn rustsec_2024_0428_kvm_ioctls_has_a_floor() {
        assert_eq!(below_floor(&lock("kvm-ioctls", "0.19.0")).len(), 1);
        assert!(below_floor(&lock("kvm-ioctls", "0.19.1")).is_empty());
    }

    #[test]
    fn cve_2023_41051_cve_2020_13759_vm_memory_has_a_floor() {
        assert_eq!(below_floor(&lock("vm-memory", "0.2.0")).len(), 1);
        assert_eq!(below_floor(&lock("vm-memory", "0.12.1")).len(), 1);
        assert!(below_floor(&lock("vm-memory", "0.18.0")).is_empty());
    }

    #[test]
    fn rustsec_2024_0437_protobuf_has_a_floor() {
        assert_eq!(below_floor(&lock("protobuf", "3.7.1")).len(), 1);
        assert!(below_floor(&lock("protobuf", "3.7.2")).is_empty());
    }

    #[test]
    fn cve_2023_50711_cve_2023_28448_have_floors() {
        let both = lock("vmm-sys-util", "0.11.2") + &lock("versionize", "0.1.9");
        assert_eq!(below_floor(&both).len(), 2);
        let both = lock("vmm-sys-util", "1.0.0") + &lock("versionize", "0.2.0");
        assert!(below_floor(&both).is_empty());
    }

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
    fn a_licence_is_one_that_is_allowed() {
        let deny = "# text\nallow = [\"MIT\", \"Unicode-3.0\"]\n";
        let with = |licence: &str| {
            let metadata = format!(r#"{{"packages":[{{"name":"a","license":{licence}}}]}}"#);
            licences(metadata.as_bytes(), deny).unwrap().len()
        };
        for good in [
            r#""MIT""#,
            r#""Apache-2.0/MIT""#,
            r#""(GPL-3.0-only OR MIT) AND Unicode-3.0""#,
        ] {
            assert_eq!(with(good), 0, "{good}");
        }
        for bad in [
            r#""GPL-3.0-only""#,
            r#""MIT AND GPL-3.0-only""#,
            r#""""#,
            "null",
        ] {
            assert_eq!(with(bad), 1, "{bad}");
        }
        assert!(licences(b"{\"packages\":[]}", "").is_err());
    }

    #[test]
    fn a_crate_without_a_rule_is_told() {
        assert_eq!(
            violations(&metadata("lepton-extra", "")).unwrap(),
            ["lepton-extra has no line in the table of crates"]
        );
    }
}
