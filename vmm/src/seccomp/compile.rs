//! From lists of system calls in JSON to BPF programs.
//!
//! Built into the program and into its build script: the built-in lists are compiled at build time, a list of the
//! user's at start. The dialect is seccompiler's, which is Firecracker's.

use seccompiler::{BpfProgram, TargetArch};
use serde_json::{Map, Value, json};

use super::optimize::optimize;

/// The kinds of threads, by the names the lists have, in the order of the compiled programs.
pub const THREADS: [&str; 3] = ["api", "vmm", "vcpu"];

/// Why a document is no set of filters.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// It is not a JSON object.
    #[error(
        "{0}; this is to be the JSON itself, not what seccompiler-bin makes of it: an object with the keys api, vmm \
         and vcpu"
    )]
    Json(serde_json::Error),
    /// A thread has no filter.
    #[error("there is no filter for the thread {0}: api, vmm and vcpu need one each")]
    Missing(&'static str),
    /// There is no such thread.
    #[error("there is no thread {0:?}, only api, vmm and vcpu")]
    Unknown(String),
    /// A rule cannot be compiled.
    #[error("thread {thread}, rule {number} ({call}): {reason}")]
    Rule {
        /// The thread.
        thread: &'static str,
        /// Its rule, counted from 1.
        number: usize,
        /// What the rule says under `syscall`.
        call: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A filter cannot be compiled, for a reason that is in no single rule.
    #[error("thread {thread}: {reason}")]
    Filter {
        /// The thread.
        thread: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// Compiles a document with a filter for each of [`THREADS`], and [optimizes](optimize) the programs.
pub fn compile(text: &[u8]) -> Result<[BpfProgram; 3], CompileError> {
    let document: Map<String, Value> = serde_json::from_slice(text).map_err(CompileError::Json)?;
    let unknown = document.keys().find(|key| {
        !THREADS
            .iter()
            .any(|thread| thread.eq_ignore_ascii_case(key))
    });
    if let Some(key) = unknown {
        return Err(CompileError::Unknown(key.clone()));
    }
    let program = |thread| {
        let filter = document
            .iter()
            .find(|(key, _)| key.eq_ignore_ascii_case(thread))
            .ok_or(CompileError::Missing(thread))?;
        compile_filter(thread, filter.1).map(optimize)
    };
    let [api, vmm, vcpu] = THREADS;
    Ok([program(api)?, program(vmm)?, program(vcpu)?])
}

fn compile_filter(thread: &'static str, filter: &Value) -> Result<BpfProgram, CompileError> {
    let rules = match filter.get("filter") {
        Some(Value::Array(rules)) => rules.as_slice(),
        _ => &[],
    };
    let blame = |index: usize, reason: String| CompileError::Rule {
        thread,
        number: index.saturating_add(1),
        call: name(rules.get(index)).unwrap_or("no name").to_owned(),
        reason,
    };
    if let Some(index) = without_effect(rules) {
        let reason = "another rule allows the same call whatever its arguments are";
        return Err(blame(index, reason.to_owned()));
    }
    seccompile(filter).map_err(|reason| {
        // The compiler does not say which rule it means: the first that it does not take alone.
        let at_fault = rules.iter().enumerate().find_map(|(index, rule)| {
            let alone =
                json!({ "default_action": "trap", "filter_action": "allow", "filter": [rule] });
            Some(blame(index, seccompile(&alone).err()?))
        });
        at_fault.unwrap_or(CompileError::Filter { thread, reason })
    })
}

fn seccompile(filter: &Value) -> Result<BpfProgram, String> {
    let text = json!({ "thread": filter }).to_string();
    let mut programs = seccompiler::compile_from_json(text.as_bytes(), TargetArch::x86_64)
        .map_err(|error| error.to_string())?;
    programs
        .remove("thread")
        .ok_or_else(|| "nothing was compiled".to_owned())
}

/// A rule with arguments beside one without for the same call. The compiler would drop the latter.
fn without_effect(rules: &[Value]) -> Option<usize> {
    let narrows = |rule: &Value| rule.get("args").is_some();
    rules.iter().position(|rule| {
        let same_call = |other: &&Value| name(Some(other)) == name(Some(rule));
        narrows(rule) && rules.iter().filter(same_call).any(|other| !narrows(other))
    })
}

fn name(rule: Option<&Value>) -> Option<&str> {
    rule?.get("syscall")?.as_str()
}
