//! What depends on the processor architecture. One so far.

pub mod x86_64;
