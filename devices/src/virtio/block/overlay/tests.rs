//! Overlays against an array of bytes.

pub(in crate::virtio::block) mod crash;
