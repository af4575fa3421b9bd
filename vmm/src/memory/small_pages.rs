//! Small pages for a guest while it boots.
//!
//! A boot touches a little in many places. Where the host backs memory with transparent huge pages by itself (`always`),
//! it would clear 2 MiB for each of these places and keep them, used or not. So there are none until the boot is over;
//! then the host's policy counts again, also for what the guest has touched by then (khugepaged).

use std::io;
use std::time::Duration;

use rustix::thread::{disable_transparent_huge_pages, transparent_huge_pages_are_disabled};

/// When a boot is over. Stripped guests take a tenth of it, and no more than speed depends on it.
pub const BOOT: Duration = Duration::from_secs(2);

/// While it lives this process gets no transparent huge pages.
pub struct SmallPages(());

impl SmallPages {
    /// Begins, unless somebody has decided for this process already.
    pub fn begin() -> io::Result<Option<Self>> {
        if transparent_huge_pages_are_disabled()? {
            return Ok(None);
        }
        disable_transparent_huge_pages(true)?;
        Ok(Some(SmallPages(())))
    }
}

impl Drop for SmallPages {
    fn drop(&mut self) {
        if let Err(error) = disable_transparent_huge_pages(false) {
            log::warn!("no transparent huge pages for this guest: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_come_back() {
        // One test: the setting is the process's.
        let small = SmallPages::begin().unwrap().unwrap();
        assert!(transparent_huge_pages_are_disabled().unwrap());
        assert!(SmallPages::begin().unwrap().is_none(), "somebody decided");
        drop(small);
        assert!(!transparent_huge_pages_are_disabled().unwrap());
    }
}
