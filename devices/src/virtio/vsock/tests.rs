//! The device from the driver's side, with real sockets of the host.

mod asked;
mod driver;
mod hostile;
mod model;
mod packets;
mod sockets;
mod windows;

use super::*;

#[test]
fn cids() {
    for bad in [0, 1, 2, u64::from(u32::MAX), 1 << 32, u64::MAX] {
        assert_eq!(Cid::try_from(bad), Err(InvalidCid(bad)));
    }
    for good in [3, 52, u64::from(u32::MAX) - 1] {
        assert_eq!(Cid::try_from(good).unwrap().get(), good);
    }
}
