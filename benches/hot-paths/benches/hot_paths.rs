//! `cargo bench -p lepton-hot-paths`: time of each path, by Criterion.

use criterion::Criterion;
use lepton_hot_paths::PATHS;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for path in PATHS {
        let mut run = (path.prepare)();
        criterion.bench_function(path.name, |bencher| bencher.iter(&mut run));
    }
    criterion.final_summary();
}
