//! x86-64: where things lie in guest memory, what firmware would have left there, and how a vCPU starts.

pub mod acpi;
pub mod compatible;
pub mod cpuid;
pub mod layout;
pub mod mptable;
pub mod paging;
pub mod registers;
