//! What runs where there is no operating system: the way from a boot protocol to ring 3, and drivers that poll.
//!
//! The program's own code runs in ring 3 with every port and all memory open to it, so that it runs at native speed
//! even where KVM emulates ring 0. There are no interrupts: whoever waits, polls memory, which does not leave the
//! guest.

#![no_std]

pub mod arguments;
pub mod boot;
pub mod copied;
pub mod memory;
pub mod port;
pub mod random;
pub mod serial;
pub mod statistics;
pub mod time;
pub mod virtio;

use core::panic::PanicInfo;

/// The program's own beginning, in ring 3, when memory and command line are known. Defined by each program.
pub type Main = fn();

/// Makes `$main` what runs after the boot. When it returns, the machine is reset.
#[macro_export]
macro_rules! program {
    ($main:path) => {
        #[unsafe(no_mangle)]
        extern "C" fn main_ring3(protocol: u64, info: u64) -> ! {
            let main: $crate::Main = $main;
            $crate::boot::prepare(protocol, info);
            main();
            $crate::boot::reset()
        }
    };
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    match info.location() {
        Some(at) => say!("PANIC {} ({}:{})", info.message(), at.file(), at.line()),
        None => say!("PANIC {}", info.message()),
    }
    boot::reset()
}
