//! A drive at a steady depth.

use guest::arguments;
use guest::random::Random;
use guest::statistics::Times;
use guest::time::{pause, ticks};
use guest::virtio::block::{
    Block, FLUSH, MAX_SLOTS, Operation, PATIENCE, SECTOR, differences, write_pattern,
};

use crate::report::{Bound, Run, refuse};

/// Which requests there are to be made.
struct Load {
    operation: Operation,
    random: Option<Random>,
    /// Requests of the size fit on the drive that often.
    places: u64,
    size: u64,
    /// Whether every other request is a flush.
    flush: bool,
    /// Whether all places are written and then read, round by round.
    check: bool,
    next: u64,
}

/// What is to be done next.
struct Next {
    operation: Operation,
    sector: u64,
    /// How often all was written before: the data is another each time.
    round: u64,
}

impl Load {
    fn next(&mut self) -> Next {
        let number = self.next;
        self.next += 1;
        if self.check {
            let turn = number / self.places;
            return Next {
                operation: match turn % 2 {
                    0 => Operation::Write,
                    _ => Operation::Read,
                },
                sector: number % self.places * (self.size / SECTOR),
                round: turn / 2,
            };
        }
        if self.flush && number % 2 == 1 {
            return Next {
                operation: Operation::Flush,
                sector: 0,
                round: 0,
            };
        }
        let number = if self.flush { number / 2 } else { number };
        let place = match &mut self.random {
            Some(random) => random.below(self.places),
            None => number % self.places,
        };
        Next {
            operation: self.operation,
            sector: place * (self.size / SECTOR),
            round: 0,
        }
    }
}

/// A request under way.
#[derive(Clone, Copy)]
struct Request {
    operation: Operation,
    sector: u64,
    seed: u64,
    since: u64,
}

/// A drive under load.
struct Drive {
    block: Block,
    load: Load,
    /// Whether data is made and checked.
    verify: bool,
    seed: u64,
    running: [Option<Request>; MAX_SLOTS],
    /// Places without a request, the first `idle` of them.
    free: [u16; MAX_SLOTS],
    idle: usize,
    started: u64,
    times: Times,
    bytes: u64,
    errors: u64,
}

impl Drive {
    fn start(&mut self, place: u16, now: u64) {
        let Next {
            operation,
            sector,
            round,
        } = self.load.next();
        let seed = self.seed.wrapping_add(round);
        let len = match operation {
            Operation::Flush => 0,
            _ => self.load.size,
        };
        if self.verify && operation == Operation::Write {
            write_pattern(self.block.data(place), seed, sector);
        }
        self.block.offer(place, operation, sector, len);
        self.running[usize::from(place)] = Some(Request {
            operation,
            sector,
            seed,
            since: now,
        });
        self.started += 1;
    }

    fn end(&mut self, place: u16, status: u8, now: u64) {
        let Some(request) = self.running[usize::from(place)].take() else {
            refuse("the drive ended a request that it did not have");
        };
        self.times.add(now - request.since);
        self.errors += u64::from(status != 0);
        if request.operation != Operation::Flush {
            self.bytes += self.load.size;
        }
        if self.verify && request.operation == Operation::Read {
            self.errors += differences(self.block.data(place), request.seed, request.sector);
        }
        if self.load.check && self.errors > 0 {
            refuse("the drive failed, or gave something else than was written");
        }
    }

    /// Gives every free place a request, if there is one to be made now.
    fn start_all(&mut self, bound: &Bound, now: u64) {
        while self.idle > 0 && bound.allows(self.started) {
            // A drive may do in any order what it has: what was written is read once all of it is written.
            let is_turn = self.load.check && self.load.next.is_multiple_of(self.load.places);
            if is_turn && self.times.count() < self.started {
                return;
            }
            self.idle -= 1;
            self.start(self.free[self.idle], now);
        }
    }

    fn set_free(&mut self, place: u16) {
        self.free[self.idle] = place;
        self.idle += 1;
    }

    /// Keeps as many requests under way as there are places; the ticks that it took.
    fn run(&mut self, bound: &Bound) -> u64 {
        let start = ticks();
        let mut last = start;
        for place in 0..self.block.depth() {
            self.set_free(place);
        }
        self.start_all(bound, start);
        self.block.publish();
        while self.times.count() < self.started {
            let now = ticks();
            while let Some((place, status)) = self.block.done() {
                self.end(place, status, now);
                last = now;
                self.set_free(place);
                self.start_all(bound, now);
            }
            self.block.publish();
            if now - last > PATIENCE {
                refuse("the drive does not answer");
            }
            pause();
        }
        last - start
    }
}

pub fn run(mode: &str) {
    let size = arguments::number("size", 4096);
    if size == 0 || !size.is_multiple_of(SECTOR) {
        refuse("size is not a number of sectors");
    }
    let depth = arguments::number("qd", 1);
    let drive = arguments::number("drive", 0) as usize;
    let seed = arguments::number("seed", 0);
    let Some(block) = Block::start(drive, depth, size) else {
        refuse("there is no such drive");
    };
    if mode == "blk_flush" && block.features() & FLUSH == 0 {
        refuse("the drive offers no flush");
    }
    let load = Load {
        operation: match mode {
            "blk_read" => Operation::Read,
            _ => Operation::Write,
        },
        random: match arguments::text("pattern").unwrap_or("sequential") {
            "random" => Some(Random::new(seed)),
            "sequential" => None,
            _ => refuse("pattern is neither random nor sequential"),
        },
        places: block.sectors() * SECTOR / size,
        size,
        flush: mode == "blk_flush",
        check: mode == "blk_check",
        next: 0,
    };
    if load.places == 0 {
        refuse("the drive is smaller than one request");
    }
    let mut drive = Drive {
        block,
        load,
        verify: mode == "blk_check" || arguments::number("verify", 0) == 1,
        seed,
        running: [None; MAX_SLOTS],
        free: [0; MAX_SLOTS],
        idle: 0,
        started: 0,
        times: Times::new(),
        bytes: 0,
        errors: 0,
    };
    let ticks = drive.run(&Bound::from_arguments(1000));
    let run = Run {
        mode,
        ticks,
        bytes: drive.bytes,
        errors: drive.errors,
        times: &drive.times,
    };
    run.tell(format_args!(
        ",\"qd\":{},\"size\":{size}",
        drive.block.depth()
    ));
}
