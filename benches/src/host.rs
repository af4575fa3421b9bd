//! The machine on which a run took place.

use std::path::Path;

use lepton_tests::programs::{hardware_kvm, kvm};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A description of it.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// The processor's name.
    pub processor: String,
    /// How many threads it runs at once.
    pub cores: usize,
    /// Its memory in MiB.
    pub memory_mib: u64,
    /// Release and version of the kernel.
    pub kernel: String,
    /// What /dev/kvm is.
    pub kvm: String,
    /// /proc/loadavg when the run began: other work disturbs.
    pub load_before: String,
    /// The same at its end.
    pub load_after: String,
}

impl Host {
    /// This one.
    pub fn describe() -> Self {
        let uname = rustix::system::uname();
        Self {
            processor: value_in("/proc/cpuinfo", "model name"),
            cores: std::thread::available_parallelism().map_or(0, Into::into),
            memory_mib: kib(&value_in("/proc/meminfo", "MemTotal")) >> 10,
            kernel: format!(
                "{} {}",
                uname.release().to_string_lossy(),
                uname.version().to_string_lossy()
            ),
            kvm: describe_kvm(),
            load_before: load(),
            load_after: String::new(),
        }
    }
}

fn describe_kvm() -> String {
    match (kvm(), hardware_kvm()) {
        (Err(error), _) => format!("not usable: {error}"),
        (_, Ok(())) => "hardware virtualization".to_owned(),
        (Ok(()), Err(_)) => {
            "emulated: the processor has neither svm nor vmx; a guest's kernel mode is interpreted"
                .to_owned()
        }
    }
}

/// The machine's load as text.
pub fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.trim().to_owned()
}

/// Memory that programs could still take, in MiB.
pub fn available_memory_mib() -> u64 {
    kib(&value_in("/proc/meminfo", "MemAvailable")) >> 10
}

fn value_in(path: &str, key: &str) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    line.map_or_else(String::new, |rest| {
        rest.trim_start_matches([' ', '\t', ':']).to_owned()
    })
}

fn kib(text: &str) -> u64 {
    text.trim_end_matches(" kB").parse().unwrap_or(0)
}

/// A file's SHA-256 in hexadecimal, or why there is none.
pub fn sha256(path: &Path) -> String {
    match std::fs::read(path) {
        Ok(bytes) => Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
        Err(error) => error.to_string(),
    }
}
