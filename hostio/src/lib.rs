//! What the host's kernel offers to devices and servers, behind safe interfaces; every unsafe call that they need.

pub mod arguments;
pub mod file;
pub mod inherited;
pub mod listener;
pub mod packet;
pub mod scheduler;
pub mod stream;
pub mod streams;
pub mod tap;
pub mod uring;
