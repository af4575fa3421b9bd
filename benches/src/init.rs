//! A root image whose init says that it runs, by its first instructions, and restarts the machine.
//!
//! An EROFS image without compression (Linux, `fs/erofs/erofs_fs.h`): the superblock, then a block of inodes, a block
//! with the root folder's entries, and the program. It has `/dev`, where the kernel mounts devtmpfs, and `/init`.

use std::io;
use std::path::{Path, PathBuf};

/// What init writes to the console; the kernel writes no such byte.
pub const MARK: u8 = 0x01;
/// Where the program is in the image; for `init=` on the kernel's command line.
pub const PATH: &str = "/init";

const BLOCK: usize = 4096;
const INODE: usize = 32;
const FOLDER: u16 = 0o040_755;
const FILE: u16 = 0o100_755;
/// Numbers of the inodes: their places in the block of inodes.
const ROOT: u16 = 1;
const DEV: u16 = 2;
const INIT: u16 = 3;

/// Writes the image into `folder`.
pub fn write_image(folder: &Path) -> io::Result<PathBuf> {
    let path = folder.join("init.erofs");
    std::fs::write(&path, image(&program()))?;
    Ok(path)
}

/// A static program: writes [`MARK`] to its standard output, then restarts the machine.
fn program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let code: &[&[u8]] = &[
        &[0x6a, MARK],                   // push MARK
        &[0xb8, 1, 0, 0, 0],             // mov eax, SYS_write
        &[0x89, 0xc7],                   // mov edi, eax: stdout
        &[0x48, 0x89, 0xe6],             // mov rsi, rsp
        &[0x89, 0xc2],                   // mov edx, eax: one byte
        &[0x0f, 0x05],                   // syscall
        &[0xb8, 169, 0, 0, 0],           // mov eax, SYS_reboot
        &[0xbf, 0xad, 0xde, 0xe1, 0xfe], // mov edi, LINUX_REBOOT_MAGIC1
        &[0xbe, 0x69, 0x19, 0x12, 0x28], // mov esi, LINUX_REBOOT_MAGIC2
        &[0xba, 0x67, 0x45, 0x23, 0x01], // mov edx, LINUX_REBOOT_CMD_RESTART
        &[0x0f, 0x05],                   // syscall
        &[0xeb, 0xfe],                   // jmp to itself
    ];
    let code = code.concat();
    let mut program = b"\x7fELF\x02\x01\x01".to_vec();
    program.resize(16, 0);
    for half in [2u16, 62, 1, 0] {
        program.extend(half.to_le_bytes()); // executable, x86-64, version
    }
    for word in [BASE + HEADERS, 64, 0] {
        program.extend(word.to_le_bytes()); // entry, program headers, no sections
    }
    program.extend([0; 4]);
    for half in [64u16, 56, 1, 0, 0, 0] {
        program.extend(half.to_le_bytes());
    }
    program.extend([1, 0, 0, 0, 5, 0, 0, 0]); // PT_LOAD, readable and executable
    let size = HEADERS + code.len() as u64;
    for word in [0, BASE, BASE, size, size, BLOCK as u64] {
        program.extend(word.to_le_bytes());
    }
    program.extend(code);
    program
}

/// An image with `init`, a program of at most a block.
fn image(init: &[u8]) -> Vec<u8> {
    let root = entries(&[
        (".", ROOT, 2),
        ("..", ROOT, 2),
        ("dev", DEV, 2),
        ("init", INIT, 1),
    ]);
    let dev = entries(&[(".", DEV, 2), ("..", ROOT, 2)]);
    let mut image = vec![0; 5 * BLOCK];
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, byte) in image.iter_mut().skip(at).zip(bytes) {
            *to = *byte;
        }
    };
    put(1024, &superblock());
    let inodes = [
        (ROOT, FOLDER, 3, &root, 2u32),
        (DEV, FOLDER, 2, &dev, 3),
        (INIT, FILE, 1, &init.to_vec(), 4),
    ];
    for (number, mode, links, content, block) in inodes {
        put(
            BLOCK + usize::from(number) * INODE,
            &inode(number, mode, links, content.len(), block),
        );
        put(block as usize * BLOCK, content);
    }
    image
}

fn superblock() -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(0xe0f5_e1e2u32.to_le_bytes()); // magic
    bytes.extend([0; 8]); // no checksum, no compatible features
    bytes.extend([12, 0]); // blocks of 2^12 bytes, no extension
    bytes.extend(ROOT.to_le_bytes());
    bytes.extend(3u64.to_le_bytes()); // inodes
    bytes.extend([0; 12]); // built in 1970
    bytes.extend(5u32.to_le_bytes()); // blocks
    bytes.extend(1u32.to_le_bytes()); // block of the inodes
    bytes.resize(128, 0);
    bytes
}

/// A compact inode whose content lies plainly from `block` on.
fn inode(number: u16, mode: u16, links: u16, size: usize, block: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    for half in [0, 0, mode, links] {
        bytes.extend(half.to_le_bytes());
    }
    bytes.extend((size as u32).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(block.to_le_bytes());
    bytes.extend(u32::from(number).to_le_bytes());
    bytes.resize(INODE, 0); // root's
    bytes
}

/// A block of folder entries (name, inode, kind), sorted by name: first the entries, then their names.
fn entries(list: &[(&str, u16, u8)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut names = Vec::new();
    for (name, number, kind) in list {
        let at = (list.len() * 12 + names.len()) as u16;
        bytes.extend(u64::from(*number).to_le_bytes());
        bytes.extend(at.to_le_bytes());
        bytes.extend([*kind, 0]);
        names.extend(name.bytes());
    }
    bytes.extend(names);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_lists_its_files() {
        let image = image(b"content");
        assert_eq!(image.len(), 5 * BLOCK);
        assert!(image[2 * BLOCK..].starts_with(&u64::from(ROOT).to_le_bytes()));
        assert!(image[4 * BLOCK..].starts_with(b"content"));
    }
}
