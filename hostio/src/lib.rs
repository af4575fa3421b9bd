//! Every unsafe call to the host kernel that a device needs, behind safe interfaces.

pub mod file;
pub mod inherited;
pub mod stream;
pub mod tap;
pub mod uring;
