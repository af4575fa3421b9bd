use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;

use vm_memory::VolatileSlice;

use crate::virtio::vsock::stream::HostStream;

/// A host's socket whose other end is the test.
#[derive(Default)]
pub struct FakeStream {
    pub input: VecDeque<u8>,
    pub ended: bool,
    pub broken: bool,
    pub output: Vec<u8>,
    /// Bytes it takes before it would block.
    pub room: usize,
    pub shutdowns: Vec<Shutdown>,
}

impl FakeStream {
    fn check(&self) -> io::Result<()> {
        if self.broken {
            Err(io::ErrorKind::BrokenPipe.into())
        } else if self.room == 0 {
            Err(io::ErrorKind::WouldBlock.into())
        } else {
            Ok(())
        }
    }
}

impl HostStream for FakeStream {
    fn read_into(&mut self, slices: &[VolatileSlice]) -> io::Result<usize> {
        if self.input.is_empty() {
            return match (self.broken, self.ended) {
                (true, _) => Err(io::ErrorKind::ConnectionReset.into()),
                (_, true) => Ok(0),
                _ => Err(io::ErrorKind::WouldBlock.into()),
            };
        }
        let mut total = 0;
        for slice in slices {
            let len = slice.len().min(self.input.len());
            let bytes: Vec<u8> = self.input.drain(..len).collect();
            slice.copy_from(&bytes);
            total += len;
        }
        Ok(total)
    }

    fn write_from(&mut self, slices: &[VolatileSlice]) -> io::Result<usize> {
        let mut bytes = Vec::new();
        for slice in slices {
            let mut part = vec![0; slice.len()];
            slice.copy_to(&mut part);
            bytes.extend(part);
        }
        self.write_bytes(&bytes)
    }

    fn write_bytes(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.check()?;
        let len = bytes.len().min(self.room);
        self.room -= len;
        self.output.extend(&bytes[..len]);
        Ok(len)
    }

    fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        self.shutdowns.push(how);
        Ok(())
    }
}
