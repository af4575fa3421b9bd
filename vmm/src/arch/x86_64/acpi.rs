//! ACPI tables of a hardware-reduced machine (ACPI 6.5, 3.11.1): what a stock kernel needs to find processors,
//! interrupts and virtio-mmio devices, to power off and to reboot, and to notice that it goes on as another machine. Nothing
//! interprets AML but the guest.

use acpi_tables::aml::{
    self, Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify,
    Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use super::layout;
use lepton_devices::Memory;
use lepton_devices::legacy::ioapic;
use lepton_devices::virtio::transport::mmio::REGISTER_SPACE;

/// I/O port of the sleep control register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// I/O port of the sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// What a guest writes to [`SLEEP_CONTROL_PORT`] to power off: SLP_EN with SLP_TYP 5.
pub const POWER_OFF: u8 = 1 << 5 | SLEEP_TYPE_S5 << 2;
const SLEEP_TYPE_S5: u8 = 5;
/// i8042 command port and the command that resets the machine.
const RESET_PORT: u16 = 0x64;
const RESET_COMMAND: u8 = 0xfe;

const OEM: [u8; 6] = *b"LEPTON";
const OEM_TABLE: [u8; 8] = *b"MICROVM ";
const REVISION: u32 = 1;

/// A virtio-mmio device as a guest finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// Guest physical address of its page.
    pub address: u64,
    /// Its interrupt.
    pub irq: u32,
}

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// More devices than the area below 1 MiB has room to describe.
    #[error("ACPI tables of {0} bytes do not fit below 1 MiB")]
    TooLarge(u64),
    /// Guest memory refused the write.
    #[error("ACPI tables: {0}")]
    Memory(#[from] GuestMemoryError),
}

#[derive(Default)]
struct Bytecode(Vec<u8>);

impl AmlSink for Bytecode {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }

    fn vec(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
}

fn bytes(aml: &dyn Aml) -> Vec<u8> {
    let mut sink = Bytecode::default();
    aml.to_aml_bytes(&mut sink);
    sink.0
}

fn dsdt(devices: &[MmioDevice]) -> Vec<u8> {
    let mut body = Bytecode::default();
    for (index, device) in devices.iter().enumerate() {
        let path = format!("V{index:03X}");
        Scope::new(
            "_SB_".into(),
            vec![&Device::new(
                path.as_str().into(),
                vec![
                    &Name::new("_HID".into(), &"LNRO0005"),
                    &Name::new("_UID".into(), &(index as u32)),
                    &Name::new("_CCA".into(), &aml::ONE),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![
                            &Memory32Fixed::new(true, device.address as u32, REGISTER_SPACE as u32),
                            &Interrupt::new(true, true, false, false, device.irq),
                        ]),
                    ),
                ],
            )],
        )
        .to_aml_bytes(&mut body);
    }
    Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "COM1".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                    &Name::new("_UID".into(), &aml::ZERO),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![
                            &IO::new(0x3f8, 0x3f8, 0, 8),
                            &Interrupt::new(true, true, false, false, layout::SERIAL_IRQ),
                        ]),
                    ),
                ],
            ),
            &Device::new(
                "PS2_".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0303")),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![
                            &IO::new(0x60, 0x60, 0, 1),
                            &IO::new(0x64, 0x64, 0, 1),
                            &Interrupt::new(true, true, false, false, layout::I8042_IRQ),
                        ]),
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(&mut body);
    generation(&mut body);
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&SLEEP_TYPE_S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]),
    )
    .to_aml_bytes(&mut body);
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, REVISION);
    table.append_slice(&body.0);
    table.as_slice().to_vec()
}

/// The device with the generation ID (Microsoft's Virtual Machine Generation ID, 2012), and the one that turns its
/// interrupt into a notification (ACPI 6.5, 5.6.9): a hardware-reduced machine has no other events.
fn generation(body: &mut Bytecode) {
    const CHANGED: u8 = 0x80;
    let name = || Path::new("\\_SB_.VGEN");
    Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "VGEN".into(),
                vec![
                    &Name::new("_HID".into(), &"LEPT0001"),
                    // The specification's name is longer than ACPI allows, so there is a second.
                    &Name::new(
                        "_CID".into(),
                        &Package::new(vec![&"VM_Gen_Counter", &"VMGENCTR"]),
                    ),
                    &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                    // The lower half of the address, and the upper.
                    &Name::new(
                        "ADDR".into(),
                        &Package::new(vec![&(layout::GENERATION_ID as u32), &aml::ZERO]),
                    ),
                ],
            ),
            &Device::new(
                "GED_".into(),
                vec![
                    &Name::new("_HID".into(), &"ACPI0013"),
                    &Name::new("_UID".into(), &aml::ZERO),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&Interrupt::new(
                            true,
                            true,
                            false,
                            false,
                            layout::GENERATION_IRQ,
                        )]),
                    ),
                    &Method::new(
                        "_EVT".into(),
                        1,
                        true,
                        vec![&If::new(
                            &Equal::new(&Arg(0), &layout::GENERATION_IRQ),
                            vec![&Notify::new(&name(), &CHANGED)],
                        )],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(body);
}

fn madt(vcpus: u8) -> Vec<u8> {
    let mut table = MADT::new(
        OEM,
        OEM_TABLE,
        REVISION,
        LocalInterruptController::Address(layout::LOCAL_APIC),
    );
    for id in 0..vcpus {
        table.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    table.add_structure(IoApic::new(vcpus, ioapic::BASE as u32, 0));
    bytes(&table)
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let port = |port: u16| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(port),
        )
    };
    let mut table = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup);
    table.reset_reg = port(RESET_PORT);
    table.reset_value = RESET_COMMAND;
    table.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    table.sleep_status_reg = port(SLEEP_STATUS_PORT);
    // Bits 2 and 5: no VGA, no CMOS clock. A probe for either costs a guest time and finds nothing.
    table.iapc_boot_arch = (1u16 << 2 | 1 << 5).into();
    bytes(&table.finalize())
}

/// Writes all tables at [`layout::RSDP`], and returns the RSDP's address.
pub fn write(memory: &Memory, vcpus: u8, devices: &[MmioDevice]) -> Result<u64, AcpiError> {
    let mut next = layout::RSDP + 64;
    let mut place = |table: Vec<u8>| -> Result<u64, AcpiError> {
        let at = next;
        let end = at + table.len() as u64;
        if end > layout::ACPI_END {
            return Err(AcpiError::TooLarge(end - layout::RSDP));
        }
        memory.write_slice(&table, GuestAddress(at))?;
        next = end.next_multiple_of(16);
        Ok(at)
    };
    let dsdt = place(dsdt(devices))?;
    let fadt = place(fadt(dsdt))?;
    let madt = place(madt(vcpus))?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(bytes(&xsdt))?;
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    memory.write_slice(&rsdp, GuestAddress(layout::RSDP))?;
    Ok(layout::RSDP)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap()
    }

    fn read(memory: &Memory, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |s, b| s.wrapping_add(*b))
    }

    #[test]
    fn every_table_is_reachable_and_sums_to_zero() {
        let memory = memory();
        let devices: Vec<_> = (0..32)
            .map(|i| MmioDevice {
                address: layout::VIRTIO_MMIO + i * REGISTER_SPACE,
                irq: layout::VIRTIO_IRQ + i as u32,
            })
            .collect();
        let at = write(&memory, 32, &devices).unwrap();
        let rsdp = read(&memory, at, 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let word = |b: &[u8]| u64::from_le_bytes(b.try_into().unwrap());
        let table = |at: u64| {
            let len = read(&memory, at + 4, 4);
            let bytes = read(
                &memory,
                at,
                u32::from_le_bytes(len.try_into().unwrap()) as usize,
            );
            assert_eq!(sum(&bytes), 0, "{:?}", &bytes[..4]);
            bytes
        };
        let xsdt = table(word(&rsdp[24..32]));
        assert_eq!(xsdt.len(), 36 + 16);
        let fadt = table(word(&xsdt[36..44]));
        assert_eq!(&fadt[..4], b"FACP");
        assert_eq!(&table(word(&xsdt[44..52]))[..4], b"APIC");
        let dsdt = table(word(&fadt[140..148]));
        assert_eq!(dsdt.windows(8).filter(|w| w == b"LNRO0005").count(), 32);
    }

    /// What an interpreter does with these bytes is seen where Linux notices a new generation.
    #[test]
    fn the_generation_id_is_where_the_table_says_and_has_an_event() {
        let memory = memory();
        write(&memory, 1, &[]).unwrap();
        let area = read(
            &memory,
            layout::RSDP,
            (layout::ACPI_END - layout::RSDP) as usize,
        );
        let after = |name: &[u8]| {
            let places: Vec<_> = (area.windows(name.len()).enumerate())
                .filter(|(_, window)| *window == name)
                .collect();
            assert_eq!(places.len(), 1, "{name:?}");
            &area[places[0].0 + name.len()..]
        };
        // Name (ADDR, Package (2) { DWord, Zero })
        let mut package = vec![0x12, 8, 2, 0x0c];
        package.extend((layout::GENERATION_ID as u32).to_le_bytes());
        package.push(0);
        assert!(after(b"\x08ADDR").starts_with(&package));
        assert_eq!(layout::GENERATION_ID % 4096, 0);
        assert!(after(b"\x08_DDN\x0d").starts_with(b"VM_Gen_Counter\0"));
        assert!(after(b"\x08_CID").starts_with(b"\x12\x1c\x02\x0dVM_Gen_Counter\0\x0dVMGENCTR\0"));
        // If (Arg0 == irq) { Notify (\_SB.VGEN, 0x80) }
        let event = b"\x09\xa0\x12\x93\x68\x0a\x03\x86\\\x2e_SB_VGEN\x0a\x80";
        assert!(
            after(b"_EVT").starts_with(event),
            "{:x?}",
            &after(b"_EVT")[..32]
        );
        let interrupt = after(b"ACPI0013");
        let at = interrupt.iter().position(|byte| *byte == 0x89).unwrap();
        assert_eq!(
            interrupt[at + 5..at + 9],
            layout::GENERATION_IRQ.to_le_bytes()
        );
    }

    #[test]
    fn too_many_devices_are_refused() {
        let device = MmioDevice {
            address: layout::VIRTIO_MMIO,
            irq: 5,
        };
        let result = write(&memory(), 1, &vec![device; 4000]);
        assert!(matches!(result, Err(AcpiError::TooLarge(_))), "{result:?}");
    }
}
