//! Buffers that begin with a page.

/// Bytes of a page.
const PAGE: usize = 4096;

/// A buffer that begins with a page, as those of programs that move much do. Where the heap's large ones begin, 16 bytes into
/// one, some processors copy what lies at a page's start three times slower, and that would be what is measured.
pub struct Pages {
    room: Vec<u8>,
    len: usize,
}

impl Pages {
    /// `len` zeroes.
    pub fn new(len: usize) -> Self {
        let room = vec![0; len.saturating_add(PAGE)];
        Self { room, len }
    }

    /// All of it. It stays where it is until it is dropped.
    pub fn bytes(&mut self) -> &mut [u8] {
        let start = self.room.as_ptr().align_offset(PAGE);
        let end = start.saturating_add(self.len);
        self.room.get_mut(start..end).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begins_with_a_page_and_is_as_long_as_asked_for() {
        for len in [0, 1, PAGE, 256 << 10] {
            let mut pages = Pages::new(len);
            assert_eq!(pages.bytes().len(), len);
            assert!(pages.bytes().as_ptr().addr().is_multiple_of(PAGE));
        }
    }
}
