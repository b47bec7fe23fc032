//! What a power cut leaves of a log.
//!
//! A disk keeps what was written before its last flush. Of what came after, it keeps any part, in any order, and a write
//! of several sectors may be torn between two of them.

use std::fmt;
use std::str::FromStr;

use super::device::{Content, Device, Op};
use super::filesystem::Filesystem;
use crate::chance::Chance;

/// What the power cut did to the writes after the last flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// All are there.
    Prefix,
    /// Some are there.
    Subset,
    /// Some are there, and some of those in part.
    Torn,
}

/// One power cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CrashState {
    /// What of the last writes is there.
    pub cut: Cut,
    /// Decides which.
    pub seed: u64,
    /// The first operation of the log that didn't reach the disk.
    pub op: usize,
}

/// Bytes that a disk writes wholly or not at all.
const SECTOR: usize = 512;

impl CrashState {
    /// About `count` states, over the whole log and all three cuts, in the order of the log; each is another one.
    pub fn spread(ops: &[Op], count: usize, seed: u64) -> Vec<CrashState> {
        let end = ops.len() + 1;
        let prefixes = end.min(count / 3);
        let mut out: Vec<_> = (0..prefixes).map(|n| CrashState { cut: Cut::Prefix, seed: 0, op: n * end / prefixes }).collect();
        let others = count - prefixes;
        out.extend((0..others).map(|n| {
            let cut = if n % 2 == 0 { Cut::Subset } else { Cut::Torn };
            CrashState { cut, seed: seed + n as u64, op: n * end / others }
        }));
        out.sort_by_key(|state| state.op);
        out
    }

    /// The last step that was acknowledged before it.
    pub fn acknowledged(&self, ops: &[Op]) -> Option<usize> {
        ops[..self.op].iter().rev().find_map(|op| if let Op::Mark(step) = op { Some(*step) } else { None })
    }

    /// As `COLDSPARE_BLOCKLOG` takes it.
    pub fn on(&self, filesystem: Filesystem) -> String {
        format!("{}:{}:{}:{}", filesystem.name(), self.cut, self.seed, self.op)
    }

    /// Reads what [`CrashState::on`] wrote; `None` when it is none.
    pub fn parse(text: &str) -> Option<(String, CrashState)> {
        let mut fields = text.split(':');
        let filesystem = fields.next()?.to_string();
        let cut = fields.next()?.parse().ok()?;
        let (seed, op) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        fields.next().is_none().then_some((filesystem, CrashState { cut, seed, op }))
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Cut::Prefix => "prefix",
            Cut::Subset => "subset",
            Cut::Torn => "torn",
        })
    }
}

impl FromStr for Cut {
    type Err = ();

    fn from_str(text: &str) -> Result<Cut, ()> {
        [Cut::Prefix, Cut::Subset, Cut::Torn].into_iter().find(|cut| cut.to_string() == text).ok_or(())
    }
}

/// Makes one state after the other on a device that was rewound.
pub struct Replay<'a> {
    device: &'a Device,
    ops: &'a [Op],
    /// How much of the log is on the device for good.
    durable: usize,
}

impl<'a> Replay<'a> {
    /// Begins before the first of `ops`, which `device` logged.
    pub fn new(device: &'a Device, ops: &'a [Op]) -> Replay<'a> {
        Replay { device, ops, durable: 0 }
    }

    /// Makes `state`; the one before it was not later in the log. Nothing is mounted.
    ///
    /// Cost: the writes since the last state, no copy of the image.
    pub fn make(&mut self, state: &CrashState) {
        let mut content = self.device.content();
        content.undo_all();
        let flushed = self.ops[..state.op].iter().rposition(|op| *op == Op::Flush).unwrap_or(0);
        assert!(self.durable <= flushed, "states are made in the order of the log");
        for op in &self.ops[self.durable..flushed] {
            content.perform(op);
        }
        self.durable = flushed;
        let mut chance = Chance::new(state.seed);
        // Nearly all, nearly none and half each find what the others don't.
        let kept_of_8 = *chance.pick(&[1, 4, 7]);
        for op in &self.ops[flushed..state.op] {
            if state.cut == Cut::Prefix || chance.happens(kept_of_8, 8) {
                write(&mut content, op, state.cut, &mut chance);
            }
        }
    }
}

fn write(content: &mut Content, op: &Op, cut: Cut, chance: &mut Chance) {
    match op {
        Op::Write { at, bytes } => {
            let sectors = bytes.len() / SECTOR;
            if cut != Cut::Torn || sectors < 2 || chance.happens(1, 2) {
                return content.write(*at, bytes);
            }
            let (first, second) = bytes.split_at(SECTOR * (1 + chance.below(sectors as u64 - 1) as usize));
            if chance.happens(3, 4) {
                content.write(*at, first);
            } else {
                content.write(at + first.len(), second);
            }
        }
        Op::Zero { at, len } => content.zero(*at, *len),
        Op::Flush | Op::Mark(_) => {}
    }
}
