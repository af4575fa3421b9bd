//! Random frames through random rings against the simplest model there is: a list of frames.

use proptest::prelude::*;

use super::*;

#[derive(Debug, Clone)]
enum Step {
    /// The driver offers a buffer in descriptors of these sizes.
    Offer(Vec<usize>),
    /// A frame of this size arrives.
    Arrive(usize),
    TapEvent,
    Kick,
    /// The driver takes what was used.
    Collect,
    Quiesce,
}

fn step() -> impl Strategy<Value = Step> {
    let sizes = prop_oneof![
        3 => prop::collection::vec(12usize..200, 1..4),
        2 => prop::collection::vec(1500usize..2000, 1..3),
        1 => prop::collection::vec(1usize..20, 12..14),
        1 => Just(vec![66_000]),
    ];
    prop_oneof![
        6 => sizes.prop_map(Step::Offer),
        4 => (14usize..1600).prop_map(Step::Arrive),
        1 => (1600usize..65_550).prop_map(Step::Arrive),
        3 => Just(Step::TapEvent),
        3 => Just(Step::Kick),
        2 => Just(Step::Collect),
        1 => Just(Step::Quiesce),
    ]
}

/// The driver's view on the frames received.
#[derive(Default)]
struct Collected {
    offered: VecDeque<(u16, Vec<Buffer>)>,
    frames: Vec<Vec<u8>>,
}

impl Collected {
    /// Takes whole frames from the used ring; a frame of which only a part is there is an error.
    fn collect(&mut self, bench: &mut Bench) {
        let mut used = bench.driver.queues[RX].used().into_iter();
        while let Some(first) = used.next() {
            let mut bytes = self.part(bench, first);
            let count = u16::from_le_bytes([bytes[10], bytes[11]]);
            assert!(count > 0);
            for _ in 1..count {
                let next = used.next().expect("part of a frame is missing");
                bytes.extend(self.part(bench, next));
            }
            self.frames.push(bytes.split_off(HEADER));
        }
    }

    fn part(&mut self, bench: &Bench, (head, len): (u16, u32)) -> Vec<u8> {
        let (offered, buffers) = self.offered.pop_front().expect("more used than offered");
        assert_eq!(head, offered, "out of order");
        bench.received(&buffers, len)
    }
}

fn receive(features: u64, steps: Vec<Step>) {
    let mut bench = Bench::with(features, 128, Default::default(), Default::default());
    let mut arrived = Vec::new();
    let mut collected = Collected::default();
    for (seed, step) in steps.into_iter().enumerate() {
        match step {
            Step::Offer(sizes) => {
                if bench.driver.queues[RX].free_descriptors() >= sizes.len() {
                    let offer = bench.offer(&sizes);
                    collected.offered.push_back(offer);
                }
            }
            Step::Arrive(len) => {
                let bytes = frame(len, seed);
                bench.arrive(&bytes);
                arrived.push(bytes);
            }
            Step::TapEvent => assert_eq!(bench.tap_event(), Progress::Done),
            Step::Kick => assert_eq!(bench.kick(RX), Progress::Done),
            Step::Collect => collected.collect(&mut bench),
            Step::Quiesce => bench.net.quiesce().unwrap(),
        }
    }
    // While buffers and events come, frames go, whatever the ring is full of.
    for _ in 0..=arrived.len() {
        if bench.driver.queues[RX].free_descriptors() > 0 {
            let offer = bench.offer(&[66_000]);
            collected.offered.push_back(offer);
        }
        assert_eq!(bench.kick(RX), Progress::Done);
        for _ in 0..=PATIENCE {
            assert_eq!(bench.tap_event(), Progress::Done);
        }
        collected.collect(&mut bench);
    }
    let metrics = bench.net.metrics();
    let dropped = metrics.rx_fails.get() as usize;
    assert_eq!(bench.still_on_the_wire(), 0);
    assert_eq!(collected.frames.len() + dropped, arrived.len());
    assert_eq!(
        metrics.rx_packets_count.get() as usize,
        collected.frames.len()
    );
    // In order, intact, and each at most once.
    let mut rest = arrived.iter();
    for frame in &collected.frames {
        assert!(
            rest.any(|arrived| arrived == frame),
            "a frame is not what arrived"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn frames_are_delivered_or_counted_mergeable(steps in prop::collection::vec(step(), 0..80)) {
        receive(MERGEABLE, steps);
    }

    #[test]
    fn frames_are_delivered_or_counted_large(steps in prop::collection::vec(step(), 0..80)) {
        let large = MERGEABLE | 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO6;
        receive(large, steps);
    }

    #[test]
    fn frames_are_delivered_or_counted_single(steps in prop::collection::vec(step(), 0..80)) {
        receive(VERSION_1, steps);
    }

    /// What the driver sends goes out in order, as the pure check of headers says, however it is cut.
    #[test]
    fn frames_are_sent_or_counted(
        frames in prop::collection::vec(
            (any::<[u8; HEADER]>(), 0usize..3000, prop::collection::vec(1usize..1000, 0..4), any::<bool>()),
            0..40,
        ),
    ) {
        let features = VERSION_1 | 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4;
        let mut bench = Bench::new(features);
        let mut expected = Vec::new();
        let count = frames.len();
        for (seed, (mut header, len, cuts, plain)) in frames.into_iter().enumerate() {
            if plain {
                header[..2].fill(0);
            }
            let body: Vec<u8> = (0..len).map(|i| (i ^ seed) as u8).collect();
            if let Ok(checked) = frame::check(&header, len as u64, frame::from_driver(features)) {
                expected.push([&checked[..], &body].concat());
            }
            let bytes = [&header[..], &body].concat();
            let mut rest = bytes.as_slice();
            let mut buffers = Vec::new();
            for cut in cuts {
                let (now, later) = rest.split_at(cut.min(rest.len()));
                buffers.push(bench.driver.readable(now));
                rest = later;
            }
            buffers.push(bench.driver.readable(rest));
            bench.driver.queues[TX].offer(&buffers);
        }
        prop_assert_eq!(bench.kick(TX), Progress::Done);
        let refused = bench.net.metrics().tx_malformed_frames.get() as usize;
        prop_assert_eq!(expected.len() + refused, count);
        prop_assert!(bench.sent() == expected);
        prop_assert_eq!(bench.driver.queues[TX].used().len(), count);
    }
}
