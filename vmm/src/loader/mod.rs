//! The kernel, its initrd and its command line, put into guest memory.

mod elf;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::{BzImage, KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::arch::x86_64::layout;
use crate::memory::file::{self, FilePart};
use lepton_devices::Memory;

const E820_RAM: u32 = 1;
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// Linux boot protocol, 64-bit: the entry lies 0x200 behind the start of the loaded part.
const BZIMAGE_ENTRY: u64 = 0x200;
/// `xloadflags` bit 0: the kernel has the 64-bit entry.
const XLF_KERNEL_64: u16 = 1;
const TYPE_OF_LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448; // "HdrS"
const PVH_MAGIC: u32 = 0x336e_c578;

/// Where and how the boot processor starts.
#[derive(Clone)]
pub enum Entry {
    /// The 64-bit entry of the Linux boot protocol.
    Linux64 {
        /// First instruction, guest physical.
        rip: u64,
        /// The image's own setup header, if it has one.
        header: Option<Box<setup_header>>,
    },
    /// The PVH entry: 32-bit protected mode.
    Pvh {
        /// First instruction, guest physical.
        rip: u64,
    },
}

/// What cannot be booted, and why.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The kernel is neither an x86-64 ELF image nor a bzImage, or is damaged.
    #[error("kernel image {path}: {reason}")]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The initrd does not fit or cannot be read.
    #[error("initrd {path}: {reason}")]
    Initrd {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The command line is too long or has a byte that cannot be in it.
    #[error("kernel command line: {0}")]
    CommandLine(String),
    /// The boot parameters could not be written.
    #[error("boot parameters: {0}")]
    BootParameters(String),
}

/// A file to be loaded, with the name it is known by in messages.
#[derive(Debug)]
pub struct Image {
    /// Open for reading; a regular file.
    pub file: File,
    /// Path given by the user.
    pub path: PathBuf,
}

impl Image {
    /// Its length now; 0 if the host does not tell.
    pub fn bytes(&self) -> u64 {
        self.file.metadata().map_or(0, |metadata| metadata.len())
    }
}

/// A run of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// Loads a kernel: ELF (PVH if it has that entry, else the 64-bit protocol) or bzImage.
pub fn load_kernel(memory: &Memory, image: &mut Image) -> Result<Entry, LoadError> {
    let path = image.path.clone();
    let fail = |reason: String| LoadError::Kernel {
        path: path.clone(),
        reason,
    };
    let mut magic = [0; 4];
    image
        .file
        .seek(SeekFrom::Start(0))
        .and_then(|_| image.file.read_exact(&mut magic))
        .map_err(|e| fail(format!("cannot read its first 4 bytes: {e}")))?;
    let high = Some(GuestAddress(layout::HIGH_MEMORY));
    if magic == ELF_MAGIC {
        return elf::load(memory, &image.file).map_err(fail);
    }
    let loaded =
        BzImage::load(memory, None, &mut image.file, high).map_err(|e| fail(e.to_string()))?;
    let header = check_bzimage(memory, &loaded).map_err(&fail)?;
    Ok(Entry::Linux64 {
        rip: loaded.kernel_load.0 + BZIMAGE_ENTRY,
        header: Some(Box::new(header)),
    })
}

/// Checks what the loader did not: that the image has the 64-bit entry, all of its code, and room to unpack itself.
fn check_bzimage(memory: &Memory, loaded: &KernelLoaderResult) -> Result<setup_header, String> {
    let header = loaded.setup_header.ok_or("it has no setup header")?;
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err("it has no 64-bit entry".into());
    }
    let start = loaded.kernel_load;
    let size = loaded.kernel_end.saturating_sub(start.0);
    // Linux boot protocol, syssize: the code's length in 16-byte paragraphs, rounded up.
    let expected = u64::from(header.syssize)
        .saturating_mul(16)
        .saturating_sub(15);
    if size <= BZIMAGE_ENTRY || size < expected {
        return Err(format!("it has {size} bytes of code, and says {expected}"));
    }
    let init_size = header.init_size;
    if !GuestMemoryBackend::check_range(memory, start, init_size as usize) {
        return Err(format!(
            "it needs {init_size} bytes at {:#x} to unpack itself, which is not all guest memory",
            start.0
        ));
    }
    Ok(header)
}

/// Loads an initrd at the top of the RAM below the hole, where every kernel accepts it.
pub fn load_initrd(memory: &Memory, image: &mut Image) -> Result<Placed, LoadError> {
    let path = image.path.clone();
    let fail = |reason: String| LoadError::Initrd {
        path: path.clone(),
        reason,
    };
    let size = image
        .file
        .metadata()
        .map_err(|e| fail(e.to_string()))?
        .len();
    if size == 0 {
        return Err(fail("it is empty".into()));
    }
    let low_end = memory
        .iter()
        .map(vm_memory::GuestMemoryRegion::len)
        .next()
        .unwrap_or(0);
    let address = low_end
        .checked_sub(size)
        .map(|a| a & !0xfff)
        .filter(|a| *a >= layout::HIGH_MEMORY)
        .ok_or_else(|| fail(format!("{size} bytes do not fit into guest memory")))?;
    let part = FilePart {
        offset: 0,
        length: size,
        address,
    };
    file::load(memory, &image.file, part).map_err(|e| fail(e.to_string()))?;
    Ok(Placed { address, size })
}

/// Opens a file that is to be loaded. Anything but a regular file is refused by name.
pub fn open_image(path: &Path) -> Result<Image, String> {
    // Without blocking: a named pipe must be refused, not waited for.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|e| format!("{}: {e}", path.display()))?;
    let kind = file
        .metadata()
        .map_err(|e| format!("{}: {e}", path.display()))?
        .file_type();
    if !kind.is_file() {
        let what = if kind.is_dir() {
            "a directory"
        } else {
            "not a regular file"
        };
        return Err(format!("{} is {what}", path.display()));
    }
    Ok(Image {
        file,
        path: path.to_path_buf(),
    })
}

/// Everything a kernel is told at its start.
pub struct BootInfo<'a> {
    /// Bytes of RAM.
    pub ram: u64,
    /// The complete command line.
    pub command_line: &'a str,
    /// The initrd, if there is one.
    pub initrd: Option<Placed>,
    /// Guest physical address of the RSDP.
    pub rsdp: u64,
}

/// Writes the command line and the boot parameters of the protocol that `entry` speaks.
pub fn write_boot_info(
    memory: &Memory,
    entry: &Entry,
    info: &BootInfo<'_>,
) -> Result<(), LoadError> {
    write_command_line(memory, info.command_line)?;
    match entry {
        Entry::Linux64 { header, .. } => write_zero_page(memory, header.as_deref(), info),
        Entry::Pvh { .. } => write_start_info(memory, info),
    }
}

/// Whether `line` can be a kernel's command line.
pub fn check_arguments(line: &str) -> Result<(), String> {
    const MAX: usize = layout::COMMAND_LINE_SIZE - 1;
    if line.len() > MAX {
        return Err(format!("{} bytes are more than {MAX}", line.len()));
    }
    match line.chars().find(|c| !c.is_ascii() || c.is_ascii_control()) {
        Some(c) => Err(format!("the character {c:?} cannot be in it")),
        None => Ok(()),
    }
}

fn write_command_line(memory: &Memory, line: &str) -> Result<(), LoadError> {
    check_arguments(line).map_err(LoadError::CommandLine)?;
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(layout::COMMAND_LINE))
        .map_err(|e| LoadError::CommandLine(e.to_string()))
}

fn write_zero_page(
    memory: &Memory,
    header: Option<&setup_header>,
    info: &BootInfo<'_>,
) -> Result<(), LoadError> {
    let mut params = boot_params {
        hdr: header.copied().unwrap_or_default(),
        acpi_rsdp_addr: info.rsdp,
        ..Default::default()
    };
    params.hdr.type_of_loader = TYPE_OF_LOADER_UNDEFINED;
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.hdr.cmdline_size = info.command_line.len() as u32;
    if header.is_none() {
        params.hdr.kernel_alignment = 0x0100_0000;
    }
    if let Some(initrd) = info.initrd {
        // Both lie below the hole, so within 32 bits.
        params.hdr.ramdisk_image = initrd.address as u32;
        params.hdr.ramdisk_size = initrd.size as u32;
    }
    let usable = layout::usable_ram(info.ram);
    params.e820_entries = usable.len() as u8;
    for (slot, (addr, size)) in params.e820_table.iter_mut().zip(usable) {
        *slot = boot_e820_entry {
            addr,
            size,
            r#type: E820_RAM,
        };
    }
    let boot = BootParams::new(&params, GuestAddress(layout::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&boot, memory)
        .map_err(|e| LoadError::BootParameters(e.to_string()))
}

fn write_start_info(memory: &Memory, info: &BootInfo<'_>) -> Result<(), LoadError> {
    let map: Vec<_> = layout::usable_ram(info.ram)
        .into_iter()
        .map(|(addr, size)| hvm_memmap_table_entry {
            addr,
            size,
            type_: E820_RAM,
            reserved: 0,
        })
        .collect();
    let mut start = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: info.rsdp,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    if info.initrd.is_some() {
        start.nr_modules = 1;
        start.modlist_paddr = layout::PVH_MODULES;
    }
    let mut boot = BootParams::new(&start, GuestAddress(layout::PVH_START_INFO));
    boot.set_sections(&map, GuestAddress(layout::PVH_MEMORY_MAP));
    if let Some(initrd) = info.initrd {
        let module = hvm_modlist_entry {
            paddr: initrd.address,
            size: initrd.size,
            ..Default::default()
        };
        boot.set_modules(&[module], GuestAddress(layout::PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&boot, memory)
        .map_err(|e| LoadError::BootParameters(e.to_string()))
}
