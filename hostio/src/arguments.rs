//! The command line of a process that starts without Rust's own start-up code.
#![allow(unsafe_code)] // what the C library gives to `main` are pointers

use std::ffi::{CStr, OsStr, OsString, c_char, c_int};
use std::os::unix::ffi::OsStrExt;

/// The command line, from what the C library gives to `main`. The standard library finds it by itself with glibc only.
///
/// # Safety
/// `first` must be `main`'s own second argument: `count` pointers to strings that end in NUL.
pub unsafe fn from_main(count: c_int, first: *const *const c_char) -> Vec<OsString> {
    let count = usize::try_from(count).unwrap_or(0);
    let argument = |index| {
        // SAFETY: by this function's contract.
        let text = unsafe { CStr::from_ptr(*first.add(index)) };
        OsStr::from_bytes(text.to_bytes()).to_owned()
    };
    (0..count).map(argument).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_taken_in_order() {
        let texts = [c"program", c"", c"--option=\xff"];
        let pointers = texts.map(CStr::as_ptr);
        // SAFETY: three strings, which live on.
        let found = unsafe { from_main(3, pointers.as_ptr()) };
        assert_eq!(found, texts.map(|text| OsStr::from_bytes(text.to_bytes())));
        // SAFETY: nothing is read.
        assert!(unsafe { from_main(0, std::ptr::null()) }.is_empty());
    }
}
