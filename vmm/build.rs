//! Compiles the lists of system calls into BPF programs, so that nothing is left to parse when the VMM starts.

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use serde_json::Value;

#[path = "src/seccomp/compile.rs"]
mod compile;
#[path = "src/seccomp/lists.rs"]
mod lists;
#[path = "src/seccomp/optimize.rs"]
mod optimize;

fn main() -> Result<(), Box<dyn Error>> {
    // The relocations of a position independent program as a bitmap: 85 KiB less of the program. GNU ld knows it from
    // 2.38 on, lld from 15 on, and glibc from 2.36 on.
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    // The index of the tables by which a stack is unwound: 30 KiB that nobody reads in what is shipped. A panic ends the
    // process where it is, and says where that was; without symbols a list of callers would be one of numbers.
    if env::var("PROFILE")? == "release" {
        println!("cargo::rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
        for script in ["unwind.ld", "order.ld"] {
            let script = format!("{}/{script}", env::var("CARGO_MANIFEST_DIR")?);
            println!("cargo::rustc-link-arg-bins=-Wl,-T,{script}");
            println!("cargo::rerun-if-changed={script}");
        }
    }
    let is_debug = env::var_os("CARGO_CFG_DEBUG_ASSERTIONS").is_some();
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("../resources/seccomp/x86_64");
    let read = |name: &str| -> Result<Value, Box<dyn Error>> {
        let path = folder.join(name).with_extension("json");
        println!("cargo::rerun-if-changed={}", path.display());
        let named = |error: &dyn Error| format!("{}: {error}", path.display());
        let text = fs::read(&path).map_err(|error| named(&error))?;
        Ok(serde_json::from_slice(&text).map_err(|error| named(&error))?)
    };
    let c_library = env::var("CARGO_CFG_TARGET_ENV")?;
    let document = lists::assemble(&compile::THREADS, &c_library, is_debug, read)?;
    println!("cargo::rerun-if-changed=src/seccomp/lists.rs");
    println!("cargo::rerun-if-changed=src/seccomp/compile.rs");
    println!("cargo::rerun-if-changed=src/seccomp/optimize.rs");
    let programs = compile::compile(document.to_string().as_bytes())?;
    let mut code = String::new();
    for (thread, program) in compile::THREADS.iter().zip(programs) {
        let name = thread.to_uppercase();
        writeln!(
            code,
            "pub static {name}: [sock_filter; {}] = [",
            program.len()
        )?;
        for step in program {
            let (code_, jt, jf, k) = (step.code, step.jt, step.jf, step.k);
            writeln!(
                code,
                "    sock_filter {{ code: {code_}, jt: {jt}, jf: {jf}, k: {k} }},"
            )?;
        }
        writeln!(code, "];")?;
    }
    fs::write(Path::new(&env::var("OUT_DIR")?).join("seccomp.rs"), code)?;
    Ok(())
}
