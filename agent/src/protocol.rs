//! The protocol's types, client and server, generated from `proto/agent.proto`.

#[allow(missing_docs, unused, clippy::all, clippy::pedantic)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

pub use generated::{agent::*, agent_ttrpc::*};
