//! A shorter BPF program that decides the same.
//!
//! seccompiler compares a call's number with one after the other, and so with arguments. The kernel checks and
//! translates every step of a program when a thread takes it, and runs it once for each call number there is. Here the
//! program is read as what it is, a decision by a few words of `seccomp_data`, and written again as balanced trees of
//! comparisons whose ends are shared.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use seccompiler::sock_filter;

// linux/bpf_common.h
const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const IF_GREATER: u16 = 0x25; // BPF_JMP | BPF_JGT | BPF_K
const IF_NOT_LESS: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

/// Most nodes that a decision may have on the way. Rules that narrow many arguments of one call by ranges multiply; a
/// program of theirs stays as it is.
const MAX_NODES: usize = 1 << 15;
/// How far a conditional jump reaches, less the two steps that may come between.
const REACH: usize = 253;

/// A node of the decision, by its place in [`Decision::nodes`]. What it leads to has a smaller one.
type Id = usize;

/// 32 bits of `seccomp_data`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Word {
    offset: u32,
    mask: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Comparison {
    Equal,
    Greater,
    NotLess,
}

impl Comparison {
    fn holds(self, value: u32, operand: u32) -> bool {
        match self {
            Comparison::Equal => value == operand,
            Comparison::Greater => value > operand,
            Comparison::NotLess => value >= operand,
        }
    }

    fn code(self) -> u16 {
        match self {
            Comparison::Equal => IF_EQUAL,
            Comparison::Greater => IF_GREATER,
            Comparison::NotLess => IF_NOT_LESS,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Node {
    Return(u32),
    Test(Test),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Test {
    word: Word,
    comparison: Comparison,
    operand: u32,
    yes: Id,
    no: Id,
}

/// A program that decides as `program` does, in fewer steps, or `program` itself.
pub fn optimize(program: Vec<sock_filter>) -> Vec<sock_filter> {
    match shorter(&program) {
        Some(shorter) if shorter.len() < program.len() => shorter,
        _ => program,
    }
}

/// Nothing for a program that has other steps than seccompiler's, or is too much to take apart.
fn shorter(program: &[sock_filter]) -> Option<Vec<sock_filter>> {
    let mut decision = Decision::default();
    let root = decision.read(program, 0, None)?;
    let root = decision.balance(root)?;
    let mut writer = Writer {
        nodes: &decision.nodes,
        load: decision.load(root),
        steps: Vec::new(),
        entries: BTreeMap::new(),
    };
    writer.place(root);
    writer.steps.reverse();
    Some(writer.steps)
}

#[derive(Debug, Default)]
struct Decision {
    nodes: Vec<Node>,
    /// Each node stands there once.
    ids: BTreeMap<Node, Id>,
    /// What was read from a step, by what the accumulator had.
    read: BTreeMap<(usize, Option<Word>), Id>,
    balanced: BTreeMap<Id, Id>,
}

impl Decision {
    fn node(&mut self, node: Node) -> Option<Id> {
        if let Node::Test(test) = node
            && test.yes == test.no
        {
            return Some(test.yes);
        }
        if let Some(id) = self.ids.get(&node) {
            return Some(*id);
        }
        if self.nodes.len() >= MAX_NODES {
            return None;
        }
        self.nodes.push(node);
        self.ids.insert(node, self.nodes.len() - 1);
        Some(self.nodes.len() - 1)
    }

    /// What `program` decides from the step `at` on, with `word` in the accumulator.
    fn read(&mut self, program: &[sock_filter], at: usize, word: Option<Word>) -> Option<Id> {
        if let Some(id) = self.read.get(&(at, word)) {
            return Some(*id);
        }
        let step = program.get(at)?;
        // Jumps lead onwards only, so this ends.
        let after = |distance: u32| at.checked_add(1)?.checked_add(distance as usize);
        let comparison = match step.code {
            IF_EQUAL => Some(Comparison::Equal),
            IF_GREATER => Some(Comparison::Greater),
            IF_NOT_LESS => Some(Comparison::NotLess),
            _ => None,
        };
        let id = match (step.code, comparison) {
            (RETURN, _) => self.node(Node::Return(step.k))?,
            (JUMP, _) => self.read(program, after(step.k)?, word)?,
            (LOAD, _) => {
                let (offset, mask) = (step.k, u32::MAX);
                self.read(program, after(0)?, Some(Word { offset, mask }))?
            }
            (AND, _) => {
                let Word { offset, mask } = word?;
                let mask = mask & step.k;
                self.read(program, after(0)?, Some(Word { offset, mask }))?
            }
            (_, Some(comparison)) => {
                let yes = self.read(program, after(step.jt.into())?, word)?;
                let no = self.read(program, after(step.jf.into())?, word)?;
                self.node(Node::Test(Test {
                    word: word?,
                    comparison,
                    operand: step.k,
                    yes,
                    no,
                }))?
            }
            _ => return None,
        };
        self.read.insert((at, word), id);
        Some(id)
    }

    /// The same decision, with a balanced tree in place of each chain of comparisons of one word.
    fn balance(&mut self, id: Id) -> Option<Id> {
        if let Some(done) = self.balanced.get(&id) {
            return Some(*done);
        }
        let Some(Node::Test(test)) = self.nodes.get(id).copied() else {
            return Some(id);
        };
        let offset = test.word.offset;
        let starts = self.starts(id, offset);
        let done = if starts.len() > 1 {
            let mut ranges: Vec<(u32, Id)> = Vec::new();
            for (n, start) in starts.iter().enumerate() {
                let is_one = starts.get(n + 1) == start.checked_add(1).as_ref();
                let rest = self.given(id, offset, *start, is_one)?;
                let rest = self.balance(rest)?;
                if ranges.last().is_none_or(|(_, last)| *last != rest) {
                    ranges.push((*start, rest));
                }
            }
            self.tree(offset, &ranges)?
        } else {
            // Only bits of the word are compared.
            let yes = self.balance(test.yes)?;
            let no = self.balance(test.no)?;
            self.node(Node::Test(Test { yes, no, ..test }))?
        };
        self.balanced.insert(id, done);
        Some(done)
    }

    /// Where the ranges begin within which every comparison of the whole word at `offset` has one result.
    fn starts(&self, root: Id, offset: u32) -> Vec<u32> {
        let mut starts = BTreeSet::from([0]);
        let mut seen = BTreeSet::new();
        let mut open = vec![root];
        while let Some(id) = open.pop() {
            let Some(Node::Test(test)) = self.nodes.get(id) else {
                continue;
            };
            if !seen.insert(id) {
                continue;
            }
            open.extend([test.yes, test.no]);
            if test.word.offset == offset && test.word.mask == u32::MAX {
                let after = test.operand.checked_add(1);
                match test.comparison {
                    Comparison::Equal => starts.extend([test.operand].into_iter().chain(after)),
                    Comparison::Greater => starts.extend(after),
                    Comparison::NotLess => starts.extend([test.operand]),
                }
            }
        }
        starts.into_iter().collect()
    }

    /// What is left to decide when the word at `offset` is in the range that starts with `value`; `is_one` if that is
    /// all of the range.
    fn given(&mut self, root: Id, offset: u32, value: u32, is_one: bool) -> Option<Id> {
        let mut rest: BTreeMap<Id, Id> = BTreeMap::new();
        let mut open = vec![root];
        while let Some(&id) = open.last() {
            let test = match self.nodes.get(id)? {
                Node::Test(test) if !rest.contains_key(&id) => *test,
                Node::Test(_) => {
                    open.pop();
                    continue;
                }
                Node::Return(_) => {
                    rest.insert(id, id);
                    open.pop();
                    continue;
                }
            };
            let decided = test.word.offset == offset && (is_one || test.word.mask == u32::MAX);
            let needed = match decided {
                true if (test.comparison).holds(value & test.word.mask, test.operand) => {
                    [test.yes; 2]
                }
                true => [test.no; 2],
                false => [test.yes, test.no],
            };
            match (rest.get(&needed[0]), rest.get(&needed[1])) {
                (Some(&yes), Some(&no)) => {
                    let node = self.node(Node::Test(Test { yes, no, ..test }))?;
                    rest.insert(id, node);
                    open.pop();
                }
                _ => open.extend(needed),
            }
        }
        rest.get(&root).copied()
    }

    /// Finds the range that the word at `offset` is in. `ranges` have their first values, in ascending order.
    fn tree(&mut self, offset: u32, ranges: &[(u32, Id)]) -> Option<Id> {
        let mask = u32::MAX;
        let word = Word { offset, mask };
        let test = match *ranges {
            [] => return None,
            [(_, only)] => return Some(only),
            [(_, no), (operand, yes), (after, again)]
                if no == again && operand.checked_add(1) == Some(after) =>
            {
                let comparison = Comparison::Equal;
                Test {
                    word,
                    comparison,
                    operand,
                    yes,
                    no,
                }
            }
            _ => {
                let (low, high) = ranges.split_at(ranges.len() / 2);
                let no = self.tree(offset, low)?;
                let yes = self.tree(offset, high)?;
                let operand = high.first()?.0;
                let comparison = Comparison::NotLess;
                Test {
                    word,
                    comparison,
                    operand,
                    yes,
                    no,
                }
            }
        };
        self.node(Node::Test(test))
    }

    /// The nodes below `root` that are reached without their word in the accumulator.
    fn load(&self, root: Id) -> BTreeSet<Id> {
        let mut load = BTreeSet::from([root]);
        let mut seen = BTreeSet::new();
        let mut open = vec![root];
        while let Some(id) = open.pop() {
            let Some(Node::Test(test)) = self.nodes.get(id) else {
                continue;
            };
            if !seen.insert(id) {
                continue;
            }
            for next in [test.yes, test.no] {
                open.push(next);
                if let Some(Node::Test(below)) = self.nodes.get(next)
                    && below.word != test.word
                {
                    load.insert(next);
                }
            }
        }
        load
    }
}

/// Writes a program from its end to its beginning, so that every jump's target has its place already.
struct Writer<'a> {
    nodes: &'a [Node],
    /// The nodes that need their word loaded.
    load: BTreeSet<Id>,
    /// The last step first.
    steps: Vec<sock_filter>,
    entries: BTreeMap<Id, Entry>,
}

/// Where a node begins, as a place in [`Writer::steps`].
#[derive(Debug, Clone, Copy)]
struct Entry {
    /// Whatever the accumulator has, for nodes in [`Writer::load`].
    cold: usize,
    /// With the word it tests in the accumulator.
    loaded: usize,
}

impl Writer<'_> {
    fn step(&mut self, code: u16, k: u32, jt: u8, jf: u8) -> usize {
        self.steps.push(sock_filter { code, jt, jf, k });
        self.steps.len() - 1
    }

    fn place(&mut self, id: Id) {
        if self.entries.contains_key(&id) {
            return;
        }
        let entry = match self.nodes[id] {
            Node::Return(action) => {
                let cold = self.step(RETURN, action, 0, 0);
                Entry { cold, loaded: cold }
            }
            Node::Test(test) => {
                self.place(test.no);
                self.place(test.yes);
                let yes = self.target(test.yes, test.word);
                let no = self.target(test.no, test.word);
                let [jt, jf] = [yes, no].map(|target| {
                    let distance = self.steps.len() - target - 1;
                    u8::try_from(distance).expect("a target is within reach")
                });
                let loaded = self.step(test.comparison.code(), test.operand, jt, jf);
                let mut cold = loaded;
                if self.load.contains(&id) {
                    if test.word.mask != u32::MAX {
                        self.step(AND, test.word.mask, 0, 0);
                    }
                    cold = self.step(LOAD, test.word.offset, 0, 0);
                }
                Entry { cold, loaded }
            }
        };
        self.entries.insert(id, entry);
    }

    /// A place within reach of the next step that leads to the node `id`, where the accumulator has `word`.
    fn target(&mut self, id: Id, word: Word) -> usize {
        let entry = self.entries[&id];
        let (target, node) = match self.nodes[id] {
            Node::Test(test) if test.word == word => (entry.loaded, None),
            Node::Test(_) => (entry.cold, None),
            Node::Return(action) => (entry.cold, Some(action)),
        };
        let distance = self.steps.len() - target - 1;
        match node {
            _ if distance <= REACH => target,
            // As long as a jump to it, and nearer for what comes before.
            Some(action) => {
                let cold = self.step(RETURN, action, 0, 0);
                self.entries.insert(id, Entry { cold, loaded: cold });
                cold
            }
            None => self.step(JUMP, distance as u32, 0, 0),
        }
    }
}
