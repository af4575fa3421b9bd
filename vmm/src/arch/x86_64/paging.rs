//! Where in memory a processor finds its next instruction (Intel SDM, volume 3A, 4.5; AMD APM, volume 2, 5.3).

use kvm_bindings::{kvm_regs, kvm_sregs};

const CR0_PG: u64 = 1 << 31;
const CR4_LA57: u64 = 1 << 12;
const EFER_LMA: u64 = 1 << 10;
const PRESENT: u64 = 1;
/// In an entry above the last level: it maps a page itself.
const LARGE: u64 = 1 << 7;
/// Bits of an entry that are an address.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The way to an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetch {
    /// Linear address.
    linear: u64,
    /// Physical address of the first table, and levels of tables; none without paging.
    tables: Option<(u64, u32)>,
}

impl Fetch {
    /// To the next one of a processor with these registers. None in a mode that no guest stays in.
    pub fn next(regs: &kvm_regs, sregs: &kvm_sregs) -> Option<Self> {
        let linear = sregs.cs.base.wrapping_add(regs.rip);
        let tables = match (sregs.cr0 & CR0_PG != 0, sregs.efer & EFER_LMA != 0) {
            (false, _) => None,
            (true, true) if sregs.cr4 & CR4_LA57 != 0 => Some((sregs.cr3 & ADDRESS, 5)),
            (true, true) => Some((sregs.cr3 & ADDRESS, 4)),
            (true, false) => return None,
        };
        Some(Fetch { linear, tables })
    }

    /// The instruction's physical address; `read` gives the entry of a table at a physical address. None if it has none.
    pub fn walk(&self, mut read: impl FnMut(u64) -> Option<u64>) -> Option<u64> {
        let Some((mut table, levels)) = self.tables else {
            return Some(self.linear);
        };
        for level in (0..levels).rev() {
            // 9 bits of the address for each level, above the 12 in a page.
            let shift = 12 + 9 * level;
            let entry = read(table + (self.linear >> shift & 0x1ff) * 8)?;
            if entry & PRESENT == 0 {
                return None;
            }
            let within = (1 << shift) - 1;
            if level == 0 || level < 3 && entry & LARGE != 0 {
                return Some(entry & ADDRESS & !within | self.linear & within);
            }
            table = entry & ADDRESS;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn registers(cr0: u64, cr4: u64, efer: u64, rip: u64) -> Option<Fetch> {
        let regs = kvm_regs {
            rip,
            ..Default::default()
        };
        let sregs = kvm_sregs {
            cr0,
            cr3: 0x1000 | 0xfff,
            cr4,
            efer,
            ..Default::default()
        };
        Fetch::next(&regs, &sregs)
    }

    fn walk(fetch: Fetch, tables: &[(u64, u64)]) -> Option<u64> {
        let tables: HashMap<_, _> = tables.iter().copied().collect();
        fetch.walk(|at| tables.get(&at).copied())
    }

    #[test]
    fn without_paging_it_is_where_it_says() {
        let fetch = registers(1, 0, 0, 0x10_0000).unwrap();
        assert_eq!(walk(fetch, &[]), Some(0x10_0000));
        // 32-bit tables: kernels are there for some instructions only.
        assert_eq!(registers(CR0_PG, 0, 0, 0x10_0000), None);
    }

    #[test]
    fn pages_of_all_sizes_are_found() {
        // 4 KiB, by indices 1, 2, 3, 4 of its tables.
        let linear = 1 << 39 | 2 << 30 | 3 << 21 | 4 << 12 | 0x567;
        let fetch = registers(CR0_PG, 0, EFER_LMA, linear).unwrap();
        let top = [(0x1008, 0x2007), (0x2010, 0x3007)];
        let small = [(0x3018, 0x4007), (0x4020, 1 << 63 | 0xabc_d003)];
        assert_eq!(walk(fetch, &[top, small].concat()), Some(0xabc_d567));
        let two_mib = [(0x3018, 0x1_2340_0000 | LARGE | 3)];
        let found = walk(fetch, &[&top[..], &two_mib].concat());
        assert_eq!(found, Some(0x1_2340_0000 | 4 << 12 | 0x567));
        let one_gib = [top[0], (0x2010, 0x7_4000_0000 | LARGE | 3)];
        let found = walk(fetch, &one_gib);
        assert_eq!(found, Some(0x7_4000_0000 | 3 << 21 | 4 << 12 | 0x567));
        // Nothing there, or nothing present.
        assert_eq!(walk(fetch, &top), None);
        assert_eq!(walk(fetch, &[top[0], (0x2010, 0x3006)]), None);
    }

    #[test]
    fn five_levels_begin_one_higher() {
        let linear = 5 << 48 | 1 << 39;
        let fetch = registers(CR0_PG, CR4_LA57, EFER_LMA, linear).unwrap();
        let tables = [
            (0x1028, 0x2003),
            (0x2008, 0x3003),
            (0x3000, 0x4003),
            (0x4000, 0x5003),
            (0x5000, 0x6003),
        ];
        assert_eq!(walk(fetch, &tables), Some(0x6000));
    }

    proptest! {
        #[test]
        fn anything_ends_and_reads_within_a_table(cr4: u64, efer: u64, rip: u64, entries: [u64; 5]) {
            if let Some(fetch) = registers(CR0_PG, cr4, efer, rip) {
                let mut given = entries.into_iter();
                let mut table = 0x1000;
                let found = fetch.walk(|at| {
                    assert!(at.is_multiple_of(8) && at & ADDRESS == table);
                    let entry = given.next()? | PRESENT;
                    table = entry & ADDRESS;
                    Some(entry)
                });
                prop_assert!(found.is_some_and(|found| found < 1 << 52));
            }
        }
    }
}
