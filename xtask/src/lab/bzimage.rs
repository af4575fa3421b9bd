//! The ELF file inside a bzImage: QEMU boots it directly (PVH), and the emulated processor need not unpack 50 MiB.

use anyhow::{Context, Result, bail};

/// Magic number of LZ4's legacy frame, which the kernel's build uses.
const LZ4_LEGACY: &[u8] = &[0x02, 0x21, 0x4c, 0x18];
/// What a block of it unpacks to at most.
const BLOCK: usize = 8 << 20;

/// Unpacks the kernel of a bzImage (Linux boot protocol 2.08 or later).
///
/// # Errors
/// If it is none, or packed with something else than LZ4.
pub fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    if image.get(0x202..0x206) != Some(b"HdrS") {
        bail!("not a bzImage");
    }
    // Boot protocol: zero setup sectors stand for four, and the boot sector comes before them.
    let sectors = match image.get(0x1f1) {
        Some(0) | None => 4,
        Some(&sectors) => usize::from(sectors),
    };
    let offset = (sectors + 1) * 512 + number(image, 0x248)?;
    let length = number(image, 0x24c)?;
    let payload = image
        .get(offset..)
        .and_then(|rest| rest.get(..length))
        .context("the kernel's payload is cut off")?;
    let blocks = payload
        .strip_prefix(LZ4_LEGACY)
        .context("the kernel is not packed with LZ4")?;
    // The build puts the unpacked size after the last block.
    let (mut blocks, _size) = blocks
        .split_last_chunk::<4>()
        .context("the kernel's payload is cut off")?;
    let mut kernel = Vec::new();
    while !blocks.is_empty() {
        let length = number(blocks, 0)?;
        let block = blocks
            .get(4..)
            .and_then(|rest| rest.get(..length))
            .context("a block of the kernel is cut off")?;
        kernel.extend(
            lz4_flex::block::decompress(block, BLOCK)
                .context("a block of the kernel is damaged")?,
        );
        blocks = &blocks[4 + length..];
    }
    if !kernel.starts_with(b"\x7fELF") {
        bail!("the kernel is not an ELF file");
    }
    Ok(kernel)
}

/// The little-endian number at `offset`.
fn number(bytes: &[u8], offset: usize) -> Result<usize> {
    let bytes = bytes
        .get(offset..)
        .and_then(<[u8]>::first_chunk::<4>)
        .context("the kernel image is cut off")?;
    Ok(u32::from_le_bytes(*bytes) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 2 * 512];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        image.extend([0; 16]);
        image.extend(payload);
        image
    }

    fn packed(blocks: &[&[u8]]) -> Vec<u8> {
        let mut payload = LZ4_LEGACY.to_vec();
        for block in blocks {
            let block = lz4_flex::block::compress(block);
            payload.extend(u32::try_from(block.len()).unwrap().to_le_bytes());
            payload.extend(block);
        }
        payload.extend([0; 4]);
        payload
    }

    #[test]
    fn blocks_are_joined() {
        let packed = image(&packed(&[b"\x7fELF and", b" more"]));
        assert_eq!(unpack(&packed).unwrap(), b"\x7fELF and more");
    }

    #[test]
    fn what_is_not_such_a_kernel_is_an_error() {
        let good = image(&packed(&[b"\x7fELF and", b" more"]));
        for length in 0..good.len() {
            assert!(unpack(&good[..length]).is_err(), "{length} bytes");
        }
        assert!(unpack(&image(&packed(&[b"text"]))).is_err());
        assert!(unpack(&image(b"\xfd7zXZ and so on")).is_err());
    }
}
