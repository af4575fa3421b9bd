//! Kernel images.

use std::cell::OnceCell;

use lepton_devices::Memory;
use lepton_vmm::loader::{BootInfo, Entry, Image, load_initrd, load_kernel, write_boot_info};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::scratch::Scratch;

const MEMORY: usize = 16 << 20;

/// An image, which is also its own initrd.
pub fn kernel(data: &[u8]) {
    thread_local! {
        // Nothing that is in it changes what is done: a new one for each input would cost more than all else.
        static MEMORY_OF_GUEST: OnceCell<Memory> = const { OnceCell::new() };
    }
    MEMORY_OF_GUEST.with(|memory| {
        let memory = memory.get_or_init(|| {
            Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("guest memory")
        });
        load(memory, data);
    });
}

fn load(memory: &Memory, data: &[u8]) {
    let Scratch { file, path } = Scratch::new(data);
    let mut image = Image { file, path };
    let initrd = load_initrd(memory, &mut image).ok();
    if let Some(placed) = initrd {
        assert_eq!(placed.size, data.len() as u64);
        assert!(placed.address + placed.size <= MEMORY as u64);
    }
    let entry = match load_kernel(memory, &mut image) {
        Ok(entry) => entry,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let (Entry::Linux64 { rip, .. } | Entry::Pvh { rip }) = entry;
    assert!(
        memory.address_in_range(GuestAddress(rip)),
        "starts at {rip:#x}"
    );
    let info = BootInfo {
        ram: MEMORY as u64,
        command_line: "console=ttyS0",
        initrd,
        rsdp: 0xe_0000,
    };
    write_boot_info(memory, &entry, &info).expect("boot parameters have their place");
}
