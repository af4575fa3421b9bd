//! Builds the workspace's programs with cargo.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow};
use serde_json::Value;

use crate::progress::Progress;

/// Programs run in any root, so they are static. Before its `main`, glibc asks the processor some fifty things, each of which costs
/// microseconds where that is a virtual machine's; musl asks nothing.
const MUSL: &str = "x86_64-unknown-linux-musl";
/// What there is with every Rust.
const GNU: &str = "x86_64-unknown-linux-gnu";

/// The workspace's folder.
pub fn workspace() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// The cargo that runs us, in the workspace.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace());
    // Set for us by `cargo run`: for a package other than ours they are wrong.
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| {
            name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
        }) {
            command.env_remove(name);
        }
    }
    command
}

/// How programs are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// Quickly.
    Dev,
    /// As they are shipped.
    Release,
}

/// Programs by name.
pub struct Programs(BTreeMap<String, PathBuf>);

impl Programs {
    /// Builds the programs of `packages`, statically linked, for [`target`].
    pub fn build(progress: &Progress, profile: Profile, packages: &[&str]) -> Result<Self> {
        let target = target(progress);
        let mut command = cargo();
        command
            .args([
                "build",
                "--target",
                target,
                "--message-format=json-render-diagnostics",
                "--bins",
            ])
            .env("RUSTFLAGS", static_flags(std::env::var("RUSTFLAGS").ok()));
        for package in packages {
            command.args(["--package", package]);
        }
        if profile == Profile::Release {
            command.arg("--release");
        }
        let what = format!("building {}", packages.join(", "));
        let messages = progress.capture(&what, &mut command)?;
        Ok(Self(executables(&String::from_utf8_lossy(&messages))?))
    }

    /// The path of the program `name`.
    pub fn path(&self, name: &str) -> Result<&Path> {
        self.0
            .get(name)
            .map(PathBuf::as_path)
            .ok_or_else(|| anyhow!("cargo built no program {name}"))
    }
}

/// What programs are built for: `$CARGO_BUILD_TARGET`, or else Linux with musl, or with glibc if rustup does not have that.
pub fn target(progress: &Progress) -> &'static str {
    static TARGET: OnceLock<String> = OnceLock::new();
    TARGET.get_or_init(|| {
        let asked = std::env::var("CARGO_BUILD_TARGET").ok();
        if let Some(asked) = asked.filter(|asked| !asked.is_empty()) {
            return asked;
        }
        if is_there(MUSL) {
            return MUSL.to_owned();
        }
        let mut add = Command::new("rustup");
        add.args(["target", "add", MUSL]).current_dir(workspace());
        let what = format!("adding Rust's libraries for {MUSL}");
        match progress.run(&what, &mut add) {
            Ok(()) => MUSL.to_owned(),
            Err(error) => {
                eprintln!(
                    "{error:#}\nprograms are built with glibc instead, and start a little slower"
                );
                GNU.to_owned()
            }
        }
    })
}

/// The C library of [`target`], as `target_env` names it.
pub fn c_library(progress: &Progress) -> &'static str {
    match target(progress).ends_with("musl") {
        true => "musl",
        false => "gnu",
    }
}

/// Whether the compiler has the standard library for a target.
fn is_there(target: &str) -> bool {
    let mut rustc = Command::new("rustc");
    rustc
        .args(["--print", "target-libdir", "--target", target])
        .current_dir(workspace());
    rustc.output().is_ok_and(|output| {
        let folder = String::from_utf8_lossy(&output.stdout);
        output.status.success() && Path::new(folder.trim()).is_dir()
    })
}

fn static_flags(given: Option<String>) -> String {
    format!(
        "{} -C target-feature=+crt-static",
        given.unwrap_or_default()
    )
    .trim_start()
    .to_owned()
}

/// Executables by target name, from cargo's messages.
pub fn executables(messages: &str) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Value = serde_json::from_str(line).context("cargo's messages are not JSON")?;
        if let (Some(name), Some(path)) = (
            message["target"]["name"].as_str(),
            message["executable"].as_str(),
        ) {
            found.insert(name.to_owned(), PathBuf::from(path));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn executables_are_found_among_messages() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"lib"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"lepton"},"executable":"/t/lepton"}
not a message
{"reason":"build-finished","success":true}"#;
        let found = executables(messages).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found["lepton"], Path::new("/t/lepton"));
        assert!(executables("{half").is_err());
    }

    #[test]
    fn a_target_without_libraries_is_not_there() {
        assert!(is_there(GNU));
        assert!(!is_there("x86_64-unknown-none-of-all"));
    }

    #[test]
    fn flags_given_are_kept() {
        assert_eq!(static_flags(None), "-C target-feature=+crt-static");
        assert_eq!(
            static_flags(Some("-D warnings".into())),
            "-D warnings -C target-feature=+crt-static"
        );
    }
}
