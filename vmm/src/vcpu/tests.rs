mod model;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Gate, Order};

#[test]
fn nobody_moves_while_closed_and_everybody_leaves() {
    let gate = Arc::new(Gate::new(4));
    let passed = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let (gate, passed) = (gate.clone(), passed.clone());
            std::thread::spawn(move || {
                while gate.pass() == Order::Run {
                    passed.fetch_add(1, Ordering::SeqCst);
                }
                gate.left();
            })
        })
        .collect();
    gate.wait_until_still();
    assert_eq!(passed.load(Ordering::SeqCst), 0);
    for _ in 0..100 {
        gate.order(Order::Run);
        let before = passed.load(Ordering::SeqCst);
        while passed.load(Ordering::SeqCst) == before {
            std::thread::yield_now();
        }
        gate.order(Order::Wait);
        gate.wait_until_still();
        let still = passed.load(Ordering::SeqCst);
        std::thread::yield_now();
        assert_eq!(passed.load(Ordering::SeqCst), still);
    }
    gate.order(Order::Leave);
    for thread in threads {
        thread.join().unwrap();
    }
}
