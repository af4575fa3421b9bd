//! An overlay's own file: every write to it goes through here, so that a test can record them all.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use lepton_hostio::file::{self, Disk};
use vm_memory::VolatileSlice;

#[cfg(test)]
use super::tests::crash::{Record, Write};

pub(super) struct Store {
    disk: Disk,
    #[cfg(test)]
    pub(super) record: Option<(Record, usize)>,
}

impl Store {
    pub(super) fn new(disk: Disk) -> Self {
        Store {
            disk,
            #[cfg(test)]
            record: None,
        }
    }

    pub(super) fn disk(&self) -> &Disk {
        &self.disk
    }

    pub(super) fn file(&self) -> &File {
        self.disk.file()
    }

    pub(super) fn write_all(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        #[cfg(test)]
        self.note(|| Write::Bytes(offset, bytes.to_vec()));
        self.file().write_all_at(bytes, offset)
    }

    pub(super) fn write_vectored(
        &self,
        slices: &[VolatileSlice],
        offset: u64,
    ) -> io::Result<usize> {
        #[cfg(test)]
        self.note(|| {
            let bytes = slices.iter().flat_map(|slice| {
                let mut bytes = vec![0u8; slice.len()];
                slice.copy_to(&mut bytes);
                bytes
            });
            Write::Bytes(offset, bytes.collect())
        });
        file::write_vectored_at(self.file(), slices, offset)
    }

    pub(super) fn deallocate(&self, offset: u64, len: u64) -> io::Result<()> {
        #[cfg(test)]
        self.note(|| Write::Zeroes(offset, len));
        file::deallocate(self.file(), offset, len)
    }

    pub(super) fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        #[cfg(test)]
        self.note(|| Write::Zeroes(offset, len));
        file::zero_range(self.file(), offset, len)
    }

    pub(super) fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        #[cfg(test)]
        self.note(|| Write::Zeroes(offset, len));
        file::write_zeroes(self.file(), offset, len)
    }

    /// Puts on stable storage what was written before.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file().sync_data()?;
        #[cfg(test)]
        self.note(|| Write::Sync);
        Ok(())
    }

    #[cfg(test)]
    fn note(&self, write: impl FnOnce() -> Write) {
        if let Some((record, number)) = &self.record {
            record.lock().unwrap().push((*number, write()));
        }
    }
}
