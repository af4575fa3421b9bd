//! Guests of a few instructions: what they do, and the images that carry them.
//!
//! The code is short on purpose: where KVM is emulated, each instruction of a guest's kernel takes a microsecond. Unless
//! a program says otherwise, its bytes mean the same in 32-bit and in 64-bit mode, so that it can be entered both ways.

pub mod bzimage;
pub mod elf;

use std::fs;
use std::path::{Path, PathBuf};

/// Where every program is loaded: the lowest address a kernel may have.
pub const LOAD: u64 = 0x10_0000;

/// How the VMM enters a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit mode, paging on, the first GiB mapped one to one, RSI at the zero page (Linux boot protocol).
    Linux64,
    /// 32-bit mode, paging off, EBX at the start info (Xen's PVH boot ABI).
    Pvh,
}

/// Machine code to be run at [`LOAD`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program(Vec<u8>);

/// What a record of [`Program::watch`] begins with.
pub const RECORD: &[u8; 4] = b"\xf1REC";

/// `jmp` to itself: what is reached only if the instruction before did not end the guest.
const HANG: [u8; 2] = [0xeb, 0xfe];
/// `mov al, 0xfe; out 0x64, al`: the keyboard controller pulls the reset line.
const PULL_RESET: [u8; 4] = [0xb0, 0xfe, 0xe6, 0x64];

impl Program {
    /// A program of these instructions.
    pub fn new(code: &[u8]) -> Self {
        Self(code.to_vec())
    }

    fn with(mut self, code: &[u8]) -> Self {
        self.0.extend_from_slice(code);
        self
    }

    fn then_reset(self) -> Self {
        self.with(&PULL_RESET).with(&HANG)
    }

    /// Resets the machine.
    pub fn reset() -> Self {
        Self::new(&[]).then_reset()
    }

    /// Powers the machine off, by the ACPI sleep control register: S5 is type 5 here.
    pub fn power_off() -> Self {
        // mov dx, 0x600; mov al, 0x34; out dx, al
        Self::new(&[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee]).with(&HANG)
    }

    /// Divides by zero, with no interrupt table to find a handler in.
    pub fn triple_fault() -> Self {
        // xor ecx, ecx; div ecx
        Self::new(&[0x31, 0xc9, 0xf7, 0xf1]).with(&HANG)
    }

    /// Jumps to where only devices are, which KVM cannot fetch instructions from. For [`Entry::Pvh`].
    pub fn jump_into_the_hole() -> Self {
        // mov eax, 0xd0000000; jmp eax
        Self::new(&[0xb8, 0x00, 0x00, 0x00, 0xd0, 0xff, 0xe0])
    }

    /// Waits until something is typed on the keyboard, and goes on with `next`, which must not depend on its address.
    pub fn once_typed(next: &Program) -> Self {
        Self::key_wait().with(&next.0)
    }

    /// Waits until something is typed on the keyboard: bit 0 of its controller's status.
    fn key_wait() -> Self {
        // pause; in al, 0x64; test al, 1; jz back
        Self::new(&[0xf3, 0x90, 0xe4, 0x64, 0xa8, 0x01, 0x74, 0xf8])
    }

    /// Waits until something is typed on the keyboard, prints `text` on the serial port and resets.
    pub fn print_once_typed(text: &str) -> Self {
        Self::print_between(&Self::key_wait(), text, &Self::reset())
    }

    /// Runs for ever without an exit.
    pub fn spin() -> Self {
        // pause; jmp back
        Self::new(&[0xf3, 0x90, 0xeb, 0xfc])
    }

    /// Writes to a port where nothing is, again and again: one exit each.
    pub fn tick() -> Self {
        // out 0x80, al; jmp back
        Self::new(&[0xe6, 0x80, 0xeb, 0xfc])
    }

    /// Counts in a register and in memory at 0x600, and sends both numbers, 4 bytes each, each time. For
    /// [`Entry::Pvh`].
    pub fn count() -> Self {
        Self::new(&[
            // xor ebx, ebx; mov dx, 0x3f8
            0x31, 0xdb, 0x66, 0xba, 0xf8, 0x03, //
            // again: inc ebx; inc dword [0x600]
            0xff, 0xc3, 0xff, 0x05, 0x00, 0x06, 0x00, 0x00, //
            // mov eax, ebx; out dx, eax
            0x89, 0xd8, 0xef, //
            // mov eax, [0x600]; out dx, eax; jmp again
            0xa1, 0x00, 0x06, 0x00, 0x00, 0xef, 0xeb, 0xed,
        ])
    }

    /// Lets `interrupt` of the I/O APIC wait in the local APIC as vector 0x51. Then sends, again and again, [`RECORD`], 16 bytes
    /// at `address`, and the word of the local APIC in which that vector is bit 17. For [`Entry::Pvh`].
    pub fn watch(address: u32, interrupt: u32) -> Self {
        // again: mov dx, 0x3f8; mov eax, RECORD; out dx, eax
        Self::new(&[])
            .watches(interrupt, 0x51)
            .with(&[0x66, 0xba, 0xf8, 0x03, 0xb8])
            .with(RECORD)
            .with(&[0xef])
            .send(address, 16)
            // mov eax, [0xfee00220]; out dx, eax; jmp again
            .with(&[0xa1, 0x20, 0x02, 0xe0, 0xfe, 0xef, 0xeb, 0xde])
    }

    /// Halts until `interrupt` of the I/O APIC comes, and goes on with `next`, which must not depend on its address. For
    /// [`Entry::Pvh`].
    pub fn once_interrupted(interrupt: u32, next: &Program) -> Self {
        let before = Self::halt_until_interrupted(interrupt, 0).0.len() as u32;
        Self::halt_until_interrupted(interrupt, LOAD as u32 + before).with(&next.0)
    }

    fn halt_until_interrupted(interrupt: u32, handler: u32) -> Self {
        const VECTOR: u32 = 0x51;
        // Segments, interrupts, a stack, and what the first two are loaded from (Intel SDM 3A, 3.5.1 and 6.10).
        const GDT: u32 = 0x1000;
        const GDTR: u32 = 0x1100;
        const IDTR: u32 = 0x1110;
        const IDT: u32 = 0x2000;
        const STACK_END: u32 = 0x4000;
        let gate = IDT + 8 * VECTOR;
        Self::new(&[])
            .watches(interrupt, VECTOR)
            // Selector 8: all of memory, code.
            .store(GDT + 8, 0xffff)
            .store(GDT + 12, 0x00cf_9b00)
            .store(GDTR, GDT << 16 | 0xf)
            .store(GDTR + 4, 0)
            // A gate for interrupts.
            .store(gate, 8 << 16 | handler & 0xffff)
            .store(gate + 4, handler & 0xffff_0000 | 0x8e00)
            .store(IDTR, IDT << 16 | (8 * VECTOR + 7))
            .store(IDTR + 4, 0)
            // lgdt [GDTR]; lidt [IDTR]; mov esp, STACK_END
            .with(&[0x0f, 0x01, 0x15])
            .with(&GDTR.to_le_bytes())
            .with(&[0x0f, 0x01, 0x1d])
            .with(&IDTR.to_le_bytes())
            .with(&[0xbc])
            .with(&STACK_END.to_le_bytes())
            // sti; hlt; jmp to the hlt
            .with(&[0xfb, 0xf4, 0xeb, 0xfd])
    }

    /// Has `interrupt` of the I/O APIC come to this processor's local APIC as `vector`.
    fn watches(self, interrupt: u32, vector: u32) -> Self {
        const SPURIOUS_VECTOR: u32 = 0xfee0_00f0;
        const SELECT: u32 = 0xfec0_0000;
        const WINDOW: u32 = 0xfec0_0010;
        // Local APIC on; then the lower half of the pin's entry: unmasked, to the first processor.
        self.store(SPURIOUS_VECTOR, 0x1ff)
            .store(SELECT, 0x10 + 2 * interrupt)
            .store(WINDOW, vector)
    }

    /// Writes a word of 32 bits to memory.
    fn store(self, address: u32, value: u32) -> Self {
        // mov dword [address], value
        self.with(&[0xc7, 0x05])
            .with(&address.to_le_bytes())
            .with(&value.to_le_bytes())
    }

    /// Halts with interrupts off.
    pub fn halt() -> Self {
        // hlt; jmp back
        Self::new(&[0xf4, 0xeb, 0xfd])
    }

    /// Writes `length` bytes from `address` to the first serial port.
    fn send(self, address: u32, length: u32) -> Self {
        // mov esi, address; mov ecx, length; mov dx, 0x3f8; rep outsb
        self.with(&[0xbe])
            .with(&address.to_le_bytes())
            .with(&[0xb9])
            .with(&length.to_le_bytes())
            .with(&[0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e])
    }

    /// Sends parts of memory, each (address, length), over the serial port, then resets.
    pub fn dump(parts: &[(u32, u32)]) -> Self {
        parts
            .iter()
            .fold(Self::new(&[]), |program, (address, length)| {
                program.send(*address, *length)
            })
            .then_reset()
    }

    /// Prints `text` on the serial port and resets.
    pub fn print(text: &str) -> Self {
        Self::print_then(text, &Self::reset())
    }

    /// Prints `text` on the serial port and goes on with `next`, which must not depend on its address.
    pub fn print_then(text: &str, next: &Program) -> Self {
        Self::print_between(&Self::new(&[]), text, next)
    }

    fn print_between(first: &Program, text: &str, next: &Program) -> Self {
        let length = text.len() as u32;
        let code_length = first.clone().send(0, 0).with(&next.0).0.len() as u32;
        first
            .clone()
            .send(LOAD as u32 + code_length, length)
            .with(&next.0)
            .with(text.as_bytes())
    }

    /// Tells the boot timer that the guest is up, then resets. For [`Entry::Pvh`].
    pub fn booted() -> Self {
        // mov al, 123; mov edi, 0xc0000000; mov [edi], al
        Self::new(&[0xb0, 123, 0xbf, 0x00, 0x00, 0x00, 0xc0, 0x88, 0x07]).then_reset()
    }

    /// Writes and sends back four bytes at the end of the RAM below the hole. For [`Entry::Pvh`].
    pub fn echo_at(address: u32, value: [u8; 4]) -> Self {
        Self::new(&[])
            .store(address, u32::from_le_bytes(value))
            .send(address, 4)
            .then_reset()
    }

    /// Maps what lies at 4 GiB, writes four bytes there and sends them back. For [`Entry::Linux64`].
    ///
    /// The boot page tables lie at 0x9000; the second entry of the level below leads to a new page directory at
    /// 0xc000, whose first entry is the 2 MiB page at 4 GiB. So the second GiB begins with it.
    pub fn echo_at_4_gib(value: [u8; 4]) -> Self {
        let store = |program: Self, address: u32, value: [u8; 4]| {
            // mov dword [address], value: absolute, by a SIB byte without base and index
            program
                .with(&[0xc7, 0x04, 0x25])
                .with(&address.to_le_bytes())
                .with(&value)
        };
        const PRESENT_WRITABLE: u32 = 3;
        const LARGE: u32 = 1 << 7;
        let second_gib = 0x4000_0000u32;
        let mut program = Self::new(&[]);
        for (address, value) in [
            (0xa008, (0xc000 | PRESENT_WRITABLE).to_le_bytes()),
            (0xc000, (LARGE | PRESENT_WRITABLE).to_le_bytes()),
            (0xc004, 1u32.to_le_bytes()),
            (second_gib, value),
        ] {
            program = store(program, address, value);
        }
        program.send(second_gib, 4).then_reset()
    }

    /// Starts all other processors, waits until each has counted itself, sends the count and resets. For
    /// [`Entry::Pvh`], with at least two vCPUs.
    ///
    /// The others begin at 0x8000 in real mode (Intel SDM 3A, 9.4.4), count at 0x600 and halt.
    pub fn count_processors(others: u8) -> Self {
        const COUNT: u32 = 0x600;
        const OTHERS_CODE: u32 = 0x8000;
        const SPURIOUS_VECTOR: u32 = 0xfee0_00f0;
        const INTERRUPT_COMMAND: u32 = 0xfee0_0300;
        // lock inc byte [0x600]; hlt; jmp to the hlt
        let first = [0xf0, 0xfe, 0x06, 0x00];
        let second = [0x06, 0xf4, 0xeb, 0xfd];
        let mut program = Self::new(&[]);
        for (address, value) in [
            (OTHERS_CODE, first),
            (OTHERS_CODE + 4, second),
            // Local APIC on.
            (SPURIOUS_VECTOR, 0x1ff_u32.to_le_bytes()),
            // INIT, then start at page 8: to all but ourselves.
            (INTERRUPT_COMMAND, 0x000c_4500_u32.to_le_bytes()),
            (INTERRUPT_COMMAND, 0x000c_4608_u32.to_le_bytes()),
        ] {
            program = program.store(address, u32::from_le_bytes(value));
        }
        // again: pause; cmp byte [0x600], others; jb again
        program
            .with(&[0xf3, 0x90, 0x80, 0x3d])
            .with(&COUNT.to_le_bytes())
            .with(&[others, 0x72, 0xf5])
            .send(COUNT, 1)
            .then_reset()
    }

    /// The code.
    pub fn code(&self) -> &[u8] {
        &self.0
    }

    /// The program as an ELF image.
    pub fn elf(&self, entry: Entry) -> Vec<u8> {
        let mut image = elf::Elf::of(&self.0);
        if entry == Entry::Pvh {
            image.segments.push(elf::Segment::pvh_note(LOAD as u32));
        }
        image.bytes()
    }

    /// Writes the program as an ELF image into `folder`, and returns its path.
    pub fn write(&self, folder: &Path, entry: Entry) -> PathBuf {
        let path = folder.join("kernel");
        fs::write(&path, self.elf(entry)).expect("a kernel image can be written");
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_follows_the_code_that_prints_it() {
        let program = Program::print("hello");
        let address = u32::from_le_bytes(program.0[1..5].try_into().unwrap());
        let at = (u64::from(address) - LOAD) as usize;
        assert_eq!(&program.0[at..], b"hello");
        assert_eq!(program.0[at - 2..at], HANG);
    }

    #[test]
    fn text_is_printed_where_it_lies_once_something_is_typed() {
        let program = Program::print_once_typed("hello");
        let wait = Program::key_wait().0.len();
        assert_eq!(program.0[..wait], Program::key_wait().0);
        let address = u32::from_le_bytes(program.0[wait + 1..wait + 5].try_into().unwrap());
        assert_eq!(&program.0[(u64::from(address) - LOAD) as usize..], b"hello");
    }

    #[test]
    fn a_watch_jumps_to_its_record() {
        let code = Program::watch(0, 0).0;
        let target = code.len() - 0x22;
        assert_eq!(code[target..target + 4], [0x66, 0xba, 0xf8, 0x03]);
    }

    #[test]
    fn the_wait_for_processors_jumps_to_its_pause() {
        let code = Program::count_processors(3).0;
        let jump = code.windows(2).position(|w| w == [0x72, 0xf5]).unwrap();
        let target = jump + 2 - 0x0b;
        assert_eq!(code[target..target + 2], [0xf3, 0x90]);
    }
}
