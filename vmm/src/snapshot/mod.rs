//! A machine on disk: writing the two files and reading them. The machine's part is in [`crate::machine::state`] and
//! [`crate::machine::restore`], the form of the files in [`lepton_snapshot`].

mod create;
mod load;

pub use create::{CreateError, Extent, create};
pub use load::{Backend, LoadError, Saved};
