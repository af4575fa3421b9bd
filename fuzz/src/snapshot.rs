//! The two files of a snapshot.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use lepton_devices::legacy::i8042::I8042;
use lepton_devices::legacy::ioapic::{IoApic, MsiSink};
use lepton_devices::legacy::serial::{SerialPort, Wiring};
use lepton_devices::virtio::testing::CountingLine;
use lepton_snapshot::codec::{decode, encode};
use lepton_snapshot::{Hash, memory_file, state_file};
use lepton_vmm::machine::state::MachineState;
use lepton_vmm::vcpu::state::to_cpuid;

use crate::scratch::Scratch;

/// Where things are in a state file (see `lepton_snapshot`).
const HEADER: usize = 96;
const STATE_LENGTH: usize = 16;
const MEMORY_LENGTH: usize = 24;
const ROOT: usize = 32;
const HASH: usize = 64;
/// Larger files are as good.
const MAX_FILE: u64 = 1 << 20;

/// A state file. The first byte says how much of it is made right, since no luck finds a hash.
pub fn state_file(data: &[u8]) {
    let Some((&mend, rest)) = data.split_first() else {
        return;
    };
    let mut bytes = rest.to_vec();
    if mend & 1 != 0 {
        mend_hashes(&mut bytes);
    }
    if mend & 2 != 0 {
        // The state by itself, which behind the hashes is anybody's, too.
        return machine(rest);
    }
    let scratch = Scratch::new(&bytes);
    if mend & 4 != 0
        && let Some(size) = whole_size(&bytes)
    {
        scratch.file.set_len(size).expect("memory");
    }
    drop(state_file::version(&scratch.path));
    let Ok(mut opened) = state_file::open(&scratch.path) else {
        return;
    };
    let chunks = opened.memory.chunks();
    for chunk in [0, 1, chunks / 2, chunks.wrapping_sub(1), chunks, u64::MAX] {
        assert!(opened.memory.leaf(chunk).is_err() || chunk < chunks);
    }
    drop(opened.memory.leaves());
    machine(&opened.state);
}

fn number(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at + 8)?;
    Some(u64::from_le_bytes(field.try_into().ok()?))
}

/// How long the file has to be for its header, if that is not too much.
fn whole_size(bytes: &[u8]) -> Option<u64> {
    let (state, memory) = (number(bytes, STATE_LENGTH)?, number(bytes, MEMORY_LENGTH)?);
    let chunks = memory.div_ceil(64 << 10);
    let head = state
        .checked_add(HEADER as u64)?
        .checked_add(chunks.div_ceil(1024).checked_mul(32)?)?;
    let size = head
        .checked_next_multiple_of(4096)?
        .checked_add(chunks.checked_mul(32)?)?;
    (size <= MAX_FILE).then_some(size)
}

fn mend_hashes(bytes: &mut Vec<u8>) {
    let Some(size) = whole_size(bytes) else {
        return;
    };
    bytes.resize(size as usize, 0);
    let (Some(state), Some(memory)) = (number(bytes, STATE_LENGTH), number(bytes, MEMORY_LENGTH))
    else {
        return;
    };
    let groups_at = HEADER + state as usize;
    let groups = (memory.div_ceil(64 << 10) as usize).div_ceil(1024);
    let end = groups_at + groups * 32;
    let mut root = blake3::Hasher::new_derive_key("lepton snapshot memory root");
    root.update(&lepton_snapshot::VERSION.to_le_bytes());
    root.update(&memory.to_le_bytes());
    root.update(&bytes[groups_at..end]);
    bytes[ROOT..HASH].copy_from_slice(root.finalize().as_bytes());
    let mut head = blake3::Hasher::new_derive_key("lepton snapshot state");
    head.update(&bytes[..HASH]);
    head.update(&bytes[HEADER..end]);
    bytes[HASH..HEADER].copy_from_slice(head.finalize().as_bytes());
}

struct Nowhere;

impl MsiSink for Nowhere {
    fn send(&self, _address: u64, _data: u32) {}
}

/// What is done with a machine's state before anything of the host is opened for it.
fn machine(bytes: &[u8]) {
    let Ok(state) = decode::<MachineState>(bytes) else {
        return;
    };
    let again = encode(&state).expect("a state that was read");
    assert_eq!(encode(&decode::<MachineState>(&again).unwrap()), Ok(again));
    for vcpu in &state.vcpus {
        drop(to_cpuid(&vcpu.cpuid));
    }
    let chip = IoApic::new(Box::new(Nowhere), 24);
    if chip.load(&state.ioapic).is_ok() {
        assert_eq!(chip.save(), state.ioapic);
        for pin in 0..30 {
            chip.raise(pin);
        }
    }
    let line = || Arc::new(CountingLine::default());
    let mut keyboard = I8042::new(line());
    if keyboard.load(&state.i8042).is_ok() {
        for port in 0..8 {
            keyboard.read(port);
        }
    }
    if let Ok(mut port) = SerialPort::restored(&state.serial, wiring(line())) {
        for register in 0..8 {
            port.read(register);
            port.write(register, 0xff);
        }
    }
}

fn wiring(line: Arc<CountingLine>) -> Wiring {
    Wiring {
        line,
        out: Box::new(std::io::sink()),
        limit: None,
        room: None,
    }
}

/// A memory file, and what is asked of it.
#[derive(Arbitrary, Debug)]
struct MemoryFile<'a> {
    bytes: u64,
    root: [u8; 32],
    footer: &'a [u8],
    /// Whether the footer is where it has to be.
    is_placed: bool,
    length: u32,
}

/// A memory file's last page.
pub fn memory_file(data: &[u8]) {
    let Ok(asked) = MemoryFile::arbitrary_take_rest(Unstructured::new(data)) else {
        return;
    };
    let scratch = Scratch::new(b"");
    let at = match asked.is_placed {
        true => asked.bytes % MAX_FILE,
        false => u64::from(asked.length) % MAX_FILE,
    };
    scratch
        .file
        .set_len(at + memory_file::FOOTER)
        .expect("memory");
    let footer = asked.footer.get(..4096).unwrap_or(asked.footer);
    scratch.file.write_all_at(footer, at).expect("memory");
    let bytes = if asked.is_placed { at } else { asked.bytes };
    if memory_file::open(&scratch.path, bytes, Hash(asked.root)).is_ok() {
        // Then it is what this project writes.
        let own = Scratch::new(b"");
        memory_file::write_footer(&own.file, bytes, Hash(asked.root)).expect("memory");
        let (mut found, mut wanted) = ([0; 56], [0; 56]);
        scratch
            .file
            .read_exact_at(&mut found, bytes)
            .expect("a footer");
        own.file
            .read_exact_at(&mut wanted, bytes)
            .expect("a footer");
        assert_eq!(found, wanted);
    }
}
