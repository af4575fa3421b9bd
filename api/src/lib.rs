//! The wire of Lepton: HTTP/1.1 over a Unix socket, the bodies of requests and replies, and one table from URL to
//! [`Action`]. It knows no virtual machine and uses nothing else of this project.
//!
//! A request goes [`http`] (bytes) -> [`route`] (method, path, body) -> [`Action`] -> the caller's handler ->
//! [`Reply`] or [`Fault`] -> bytes. [`config_file`] makes the same actions from a `--config-file`. The interface is
//! Firecracker's, so that its clients work unchanged; `openapi.yaml` describes it and a test holds it to the code.

pub mod action;
pub mod client;
pub mod config_file;
pub mod http;
mod json;
pub mod route;
pub mod types;

pub use action::{Action, Fault, Reply};
pub use client::Client;
pub use http::{Server, StopHandle};
pub use json::JsonError;
