//! Generates the protocol's types, client and server from `proto/agent.proto`, in Rust alone: no
//! `protoc` is needed.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto/agent.proto");
    // The generated files begin with inner attributes, so they must be modules in files of their
    // own: src/protocol.rs includes this one, which names them.
    let modules = std::path::Path::new(&std::env::var("OUT_DIR")?).join("modules.rs");
    std::fs::write(modules, "pub mod agent;\npub mod agent_ttrpc;\n")?;
    Codegen::new()
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .customize(Customize {
            gen_mod: false,
            ..Customize::default()
        })
        .rust_protobuf_customize(
            ProtobufCustomize::default()
                .gen_mod_rs(false)
                .generate_accessors(false),
        )
        .run()?;
    Ok(())
}
