//! Hostile kernel images. Each is refused by name within a bounded time, and the VMM goes on.

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use lepton_tests::guest::elf::{self, Elf, Segment, header, program_header};
use lepton_tests::guest::{Entry, LOAD, Program, bzimage};
use lepton_tests::suite::{self, Need, Order};
use lepton_tests::{Api, Vmm, test};
use serde_json::json;

fn main() -> ExitCode {
    suite::run(
        Order::Together,
        &[Need::Kvm],
        [
            test!(truncated_elf_images),
            test!(elf_headers_that_lie),
            test!(elf_segments_that_lie),
            test!(nothing_to_run_is_refused),
            test!(ghsa_52h2_m2cf_9jh6_notes_without_end_are_bounded),
            test!(segments_that_overlap_without_end_are_bounded),
            test!(random_bytes_behind_the_magic),
            test!(truncated_bzimages),
            test!(bzimage_headers_that_lie),
            test!(a_low_segment_cannot_disturb_the_boot),
        ],
    )
}

/// No image may hold the VMM up longer than this: other requests wait meanwhile.
const BOUND: Duration = Duration::from_secs(20);

/// A VMM to which one bad image after another is given.
struct Victim {
    vmm: Vmm,
    api: Api,
    open_files: usize,
}

impl Victim {
    #[track_caller]
    fn new() -> Self {
        let (vmm, mut api) = Vmm::with_api();
        // What is opened once is opened now.
        let good = Program::reset().write(vmm.directory(), Entry::Linux64);
        api.put("/boot-source", &json!({ "kernel_image_path": good }));
        api.state();
        let open_files = vmm.open_files();
        Self {
            vmm,
            api,
            open_files,
        }
    }

    /// Gives it an image that lies in `path`. The refusal comes with the image or with the start.
    #[track_caller]
    fn refuses_file(&mut self, what: &str, path: &str) {
        let started = Instant::now();
        let source = json!({ "kernel_image_path": path }).to_string();
        let (status, reply) = self.api.request("PUT", "/boot-source", &source);
        let (status, reply) = match status {
            204 => {
                let start = json!({ "action_type": "InstanceStart" }).to_string();
                self.api.request("PUT", "/actions", &start)
            }
            _ => (status, reply),
        };
        assert_eq!(status, 400, "{what}: {reply}");
        assert!(reply.contains(path), "{what}: {reply}");
        let took = started.elapsed();
        assert!(took < BOUND, "{what}: took {took:?}");
        assert_eq!(self.api.state(), "Not started", "{what}");
        assert_eq!(self.vmm.open_files(), self.open_files, "{what}");
    }

    #[track_caller]
    fn refuses(&mut self, what: &str, image: &[u8]) {
        let path = self.vmm.file("bad", image);
        self.refuses_file(what, &path);
    }

    /// Boots a good kernel after all that.
    #[track_caller]
    fn still_boots(mut self) {
        let good = Program::power_off().write(self.vmm.directory(), Entry::Linux64);
        self.api
            .put("/boot-source", &json!({ "kernel_image_path": good }));
        self.api.start_short_life();
        self.vmm.wait().expect_code(160);
    }
}

fn truncated_elf_images() {
    let whole = Program::print("a text to be cut").elf(Entry::Pvh);
    let mut victim = Victim::new();
    let lengths = (0..=4)
        .chain([15, 16, 17, 19, 20, 24, 31, 32, 54, 56, 57, 63])
        .chain([64, 65, 119, 120, 121, 175])
        .chain([176, 0xfff, 0x1000, 0x1001, whole.len() - 21])
        .chain([
            whole.len() - 20,
            whole.len() - 8,
            whole.len() - 4,
            whole.len() - 1,
        ]);
    for length in lengths {
        victim.refuses(&format!("{length} bytes"), &whole[..length]);
    }
    victim.still_boots();
}

fn elf_headers_that_lie() {
    let good = Program::reset().elf(Entry::Linux64);
    let mut victim = Victim::new();
    let mut with = |what: &str, field: usize, value: &[u8]| {
        let mut image = good.clone();
        image[field..field + value.len()].copy_from_slice(value);
        victim.refuses(what, &image);
    };
    with("32-bit", header::CLASS, &[1]);
    with("class 0", header::CLASS, &[0]);
    with("big-endian", header::DATA, &[2]);
    with("machine 3", header::MACHINE, &3u16.to_le_bytes());
    with("machine 183", header::MACHINE, &183u16.to_le_bytes());
    for size in [0u16, 1, 32, 55, 57, u16::MAX] {
        with(
            &format!("phentsize {size}"),
            header::PHENTSIZE,
            &size.to_le_bytes(),
        );
    }
    for place in [0, 1, 63, good.len() as u64, 1 << 40, 1 << 63, u64::MAX] {
        with(
            &format!("phoff {place:#x}"),
            header::PHOFF,
            &place.to_le_bytes(),
        );
    }
    for number in [1000u16, u16::MAX] {
        with(
            &format!("phnum {number}"),
            header::PHNUM,
            &number.to_le_bytes(),
        );
    }
    for entry in [0u64, 1, 0x7000, LOAD - 1] {
        with(
            &format!("entry {entry:#x}"),
            header::ENTRY,
            &entry.to_le_bytes(),
        );
    }
    victim.still_boots();
}

fn elf_segments_that_lie() {
    let good = Program::reset().elf(Entry::Linux64);
    let mut victim = Victim::new();
    let mut with = |what: &str, fields: &[(usize, u64)]| {
        let mut image = good.clone();
        for (field, value) in fields {
            elf::set_segment(&mut image, 0, *field, *value);
        }
        victim.refuses(what, &image);
    };
    use program_header::{FILESZ, MEMSZ, OFFSET, PADDR};
    for size in [0x2000, 1 << 32, 1 << 47, 1 << 63, u64::MAX] {
        with(&format!("filesz {size:#x}"), &[(FILESZ, size)]);
    }
    for place in [0x2000, 1 << 40, i64::MAX as u64, 1 << 63, u64::MAX] {
        with(&format!("offset {place:#x}"), &[(OFFSET, place)]);
    }
    // The end of memory, just before it, the hole, behind everything, and where an end wraps around.
    for address in [
        128 << 20,
        (128 << 20) - 1,
        0xc000_0000,
        0xffff_f000,
        1 << 32,
        1 << 52,
        u64::MAX,
        u64::MAX - 2,
    ] {
        with(&format!("paddr {address:#x}"), &[(PADDR, address)]);
    }
    for size in [u64::MAX, u64::MAX - LOAD + 1, 1 << 63] {
        with(&format!("memsz {size:#x}"), &[(MEMSZ, size)]);
    }
    victim.still_boots();
}

fn nothing_to_run_is_refused() {
    let good = Program::reset().elf(Entry::Linux64);
    let mut victim = Victim::new();
    let mut empty = good.clone();
    elf::set_header(&mut empty, header::PHNUM, 0u16.to_le_bytes());
    victim.refuses("no segments", &empty);
    // An entry where nothing was loaded: the guest would run whatever is there.
    for entry in [LOAD + 0x10_0000, 128 << 20, 0xd000_0000, 1 << 47, u64::MAX] {
        let mut image = good.clone();
        elf::set_header(&mut image, header::ENTRY, entry.to_le_bytes());
        victim.refuses(&format!("entry {entry:#x}"), &image);
    }
    let mut pvh = Elf::of(Program::reset().code());
    pvh.segments.push(Segment::pvh_note(0xd000_0000));
    victim.refuses("a PVH entry in the hole", &pvh.bytes());
    victim.still_boots();
}

fn ghsa_52h2_m2cf_9jh6_notes_without_end_are_bounded() {
    let mut victim = Victim::new();
    // Notes without name and descriptor, one after the other up to the end of a large file without blocks.
    let path = victim.vmm.sparse_file("bad", 64 << 30);
    let mut image = Elf::of(Program::reset().code());
    image.segments.push(Segment::note(vec![0; 12]));
    let mut image = image.bytes();
    elf::set_segment(&mut image, 1, program_header::OFFSET, 1 << 20);
    elf::set_segment(&mut image, 1, program_header::FILESZ, 63 << 30);
    write_at_start(&path, &image);
    victim.refuses_file("63 GiB of notes", &path);
    // A note whose lengths wrap around.
    let mut image = Elf::of(Program::reset().code());
    let mut note = vec![0xff; 8];
    note.extend(18u32.to_le_bytes());
    image.segments.push(Segment::note(note));
    victim.refuses("a note of 8 GiB", &image.bytes());
    victim.still_boots();
}

fn segments_that_overlap_without_end_are_bounded() {
    let mut victim = Victim::new();
    let path = victim.vmm.sparse_file("bad", 100 << 20);
    let code = Elf::of(Program::reset().code());
    let mut image = code.bytes();
    const SEGMENTS: u16 = u16::MAX;
    elf::set_header(&mut image, header::PHNUM, SEGMENTS.to_le_bytes());
    image.resize(
        0x1000.max(header::SIZE + usize::from(SEGMENTS) * program_header::SIZE),
        0,
    );
    let first: Vec<u8> = image[header::SIZE..header::SIZE + program_header::SIZE].to_vec();
    for index in 0..usize::from(SEGMENTS) {
        let at = header::SIZE + index * program_header::SIZE;
        image[at..at + program_header::SIZE].copy_from_slice(&first);
        // All of the file, again and again.
        elf::set_segment(&mut image, index, program_header::OFFSET, 0);
        elf::set_segment(&mut image, index, program_header::FILESZ, 100 << 20);
        elf::set_segment(&mut image, index, program_header::MEMSZ, 100 << 20);
    }
    write_at_start(&path, &image);
    victim.refuses_file("6 TiB of segments in 100 MiB of file", &path);
    victim.still_boots();
}

/// Writes `bytes` at the start of a file and leaves the rest.
fn write_at_start(path: &str, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let file = fs::File::options().write(true).open(path);
    file.and_then(|file| file.write_all_at(bytes, 0))
        .expect("the file can be written");
}

/// Numbers that look random and are the same each time (xorshift, Marsaglia 2003).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }
}

fn random_bytes_behind_the_magic() {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    let mut victim = Victim::new();
    for length in [64, 120, 512, 4096, 65536] {
        let image = [&b"\x7fELF"[..], &numbers.bytes(length)].concat();
        victim.refuses(&format!("{length} random bytes"), &image);
        // The class, byte order, machine and sizes right, the rest not.
        let mut image = [
            &Program::reset().elf(Entry::Linux64)[..],
            &numbers.bytes(length),
        ]
        .concat();
        let random = numbers.bytes(program_header::SIZE);
        image[header::SIZE..header::SIZE + program_header::SIZE].copy_from_slice(&random);
        victim.refuses(
            &format!("{length} random bytes, program header too"),
            &image,
        );
    }
    for length in [1, 100, 1000, 100_000] {
        let image = numbers.bytes(length);
        victim.refuses(&format!("{length} random bytes, no magic"), &image);
    }
    victim.still_boots();
}

fn truncated_bzimages() {
    let whole = bzimage::of(Program::reset().code());
    let mut victim = Victim::new();
    for length in [
        4, 0x1f0, 0x1f1, 0x1f2, 0x202, 0x205, 0x206, 0x211, 0x214, 0x217,
    ] {
        victim.refuses(&format!("{length:#x} bytes"), &whole[..length]);
    }
    // Up to the end of the setup, and of the part before the 64-bit entry.
    for length in [0x236, 0x3ff, 0x400, 0x401, 0x5ff, 0x600] {
        victim.refuses(&format!("{length:#x} bytes"), &whole[..length]);
    }
    victim.still_boots();
}

fn bzimage_headers_that_lie() {
    let good = bzimage::of(Program::reset().code());
    let mut victim = Victim::new();
    let mut with = |what: &str, field: usize, value: &[u8]| {
        let mut image = good.clone();
        image[field..field + value.len()].copy_from_slice(value);
        victim.refuses(what, &image);
    };
    use bzimage::header::{CODE32_START, LOADFLAGS, MAGIC, SETUP_SECTS, VERSION, XLOADFLAGS};
    with("setup_sects 255", SETUP_SECTS, &[255]);
    with("no magic", MAGIC, b"HdrX");
    with("protocol 1.0", VERSION, &0x0100_u16.to_le_bytes());
    with("loaded low", LOADFLAGS, &[0]);
    with("no 64-bit entry", XLOADFLAGS, &[0, 0]);
    for start in [0, 1, 0xf_ffff, 128 << 20, 0xc000_0000, u32::MAX] {
        with(
            &format!("code32_start {start:#x}"),
            CODE32_START,
            &start.to_le_bytes(),
        );
    }
    victim.still_boots();
}

fn a_low_segment_cannot_disturb_the_boot() {
    // Where the zero page, the page tables and the descriptor table will be. Refused or overwritten: the guest boots
    // as any other, or not at all.
    for (address, length) in [
        (0x500, 64),
        (0x6000, 0x100),
        (0x7000, 0x6000),
        (0, 0x10_0000),
    ] {
        let (vmm, mut api) = Vmm::with_api();
        let mut image = Elf::of(Program::power_off().code());
        image
            .segments
            .insert(0, Segment::load(address, &vec![0xff; length]));
        let path = vmm.file("low", &image.bytes());
        let source = json!({ "kernel_image_path": path }).to_string();
        let start = json!({ "action_type": "InstanceStart" }).to_string();
        let (status, _) = api.request("PUT", "/boot-source", &source);
        if status == 204 && api_start(&mut api, &start) {
            vmm.wait().expect_code(160);
        } else {
            assert_eq!(api.state(), "Not started", "{address:#x}");
        }
    }
}

/// Whether the machine started; a refusal is a 400.
fn api_start(api: &mut Api, start: &str) -> bool {
    // The guest may be gone before the reply: that it started is then shown by its end.
    match api.try_request("PUT", "/actions", start) {
        Ok((400, _)) => false,
        Ok((204, _)) | Err(_) => true,
        Ok((status, reply)) => panic!("{status} {reply}"),
    }
}
