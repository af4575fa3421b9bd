//! What comes from another process when machines are cloned.

use arbitrary::{Arbitrary, Unstructured};
use lepton_snapshot::codec::{decode, encode};
use lepton_vmm::clone::message::{Answer, Machine, Offer};
use lepton_vmm::config::saved::Overrides;
use lepton_vmm::memory::base::{Base, Extent, new_file, seal};

use crate::scratch::Scratch;

const PAGE: u64 = 4096;

/// Memory in extents, in pages where the driver of this test is kind.
#[derive(Arbitrary, Debug)]
struct Extents {
    bytes: u64,
    is_pages: bool,
    extents: Vec<(u16, u16, u8)>,
    any: Option<(u64, u64, u32)>,
    /// Pages of each file, and whether it is sealed.
    files: Vec<(u16, bool)>,
    reads: Vec<u16>,
}

/// The first byte chooses the message.
pub fn clone_message(data: &[u8]) {
    let Some((&choice, rest)) = data.split_first() else {
        return;
    };
    match choice % 4 {
        0 => {
            if let Ok(offer) = decode::<Offer>(rest) {
                assert_eq!(decode(&encode(&offer).unwrap()), Ok(offer.clone()));
                drop(Overrides::from(offer.changes));
            }
        }
        1 => {
            if let Ok(answer) = decode::<Answer>(rest) {
                assert_eq!(decode(&encode(&answer).unwrap()), Ok(answer));
            }
        }
        2 => {
            if let Ok(machine) = decode::<Machine>(rest) {
                let again = encode(&machine).unwrap();
                assert_eq!(encode(&decode::<Machine>(&again).unwrap()), Ok(again));
            }
        }
        _ => {
            if let Ok(extents) = Extents::arbitrary(&mut Unstructured::new(rest)) {
                base(extents);
            }
        }
    }
}

fn base(asked: Extents) {
    let unit = if asked.is_pages { PAGE } else { 1 };
    let bytes = asked.bytes;
    let mut extents: Vec<_> = (asked.extents.iter())
        .map(|&(at, bytes, file)| Extent {
            at: u64::from(at) * unit,
            bytes: u64::from(bytes) * unit,
            file: file.into(),
        })
        .collect();
    extents.extend(
        asked
            .any
            .map(|(at, bytes, file)| Extent { at, bytes, file }),
    );
    let files = asked.files.iter().take(40).map(|&(pages, is_sealed)| {
        if !is_sealed {
            return Scratch::new(b"").file.into();
        }
        let file = new_file(u64::from(pages) * PAGE).expect("a memfd");
        seal(&file).expect("seals");
        file.into()
    });
    let files: Vec<_> = files.collect();
    let sizes: Vec<_> = asked
        .files
        .iter()
        .map(|(pages, _)| u64::from(*pages) * PAGE)
        .collect();
    let Ok(base) = Base::received(bytes, extents.clone(), files) else {
        return;
    };
    // The obvious model: who has this page?
    let mut last = 0;
    for extent in &extents {
        assert!(extent.bytes > 0 && extent.at >= last);
        last = extent.at + extent.bytes;
        assert!(last <= bytes && last <= sizes[extent.file as usize]);
    }
    for at in asked.reads {
        let at = u64::from(at) * 16;
        let mut buffer = [0xaa; 32];
        if at + 32 <= bytes {
            base.read(at, &mut buffer)
                .expect("memory that was accepted");
            assert_eq!(buffer, [0; 32]);
        }
    }
}
