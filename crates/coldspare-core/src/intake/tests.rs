use std::collections::BTreeSet;

use super::*;
use crate::id::SessionId;

type Machine = Intake<&'static str>;
const FULL: Baseline = Baseline::Full;

fn end(seq: u64, batches: u64) -> End {
    End { seq: Seq(seq), as_of_ms: 9, batches, segments: 0, totals: Totals::default() }
}

fn applied(seq: u64) -> Applied {
    Applied { session: SessionId([1; 16]), seq: Seq(seq), as_of_ms: 9 }
}

fn frame(machine: &mut Machine, stream: u64, seq: u64) {
    machine.handle(Input::Arrived { stream: StreamNo(stream), seq: Seq(seq), kind: FrameKind::Batch });
}

fn staged(machine: &mut Machine, stream: u64) {
    machine.handle(Input::Staged { stream: StreamNo(stream), result: Ok(()) });
}

fn stage(stream: u64) -> Effect<&'static str> {
    Effect::Stage { stream: StreamNo(stream) }
}

fn drop_of(stream: u64) -> Effect<&'static str> {
    Effect::Drop { stream: StreamNo(stream) }
}

fn check(machine: &mut Machine, expected: &[Effect<&'static str>]) {
    let effects: Vec<_> = std::iter::from_fn(|| machine.poll_effect()).collect();
    assert_eq!(effects, expected);
}

/// A machine that has begun changeset `seq`.
fn begun(seq: u64) -> Machine {
    let mut machine = Machine::new();
    begin(&mut machine, seq);
    machine
}

fn begin(machine: &mut Machine, seq: u64) {
    machine.handle(Input::Begin { seq: Seq(seq), baseline: FULL, acked: Seq(0) });
    check(machine, &[Effect::Begin { seq: Seq(seq), baseline: FULL, acked: Seq(0) }]);
    machine.handle(Input::Begun(Ok(())));
}

#[test]
fn frames_wait_for_their_begin_and_are_counted_after_the_end() {
    let mut m = Machine::new();
    frame(&mut m, 1, 1);
    check(&mut m, &[]);
    begin(&mut m, 1);
    check(&mut m, &[stage(1)]);
    m.handle(Input::End(end(1, 2)));
    staged(&mut m, 1);
    check(&mut m, &[]);
    frame(&mut m, 2, 1);
    check(&mut m, &[stage(2)]);
    staged(&mut m, 2);
    check(&mut m, &[Effect::Finish(end(1, 2))]);
    m.handle(Input::Finished(Ok(applied(1))));
    check(&mut m, &[Effect::Acked(applied(1))]);
}

#[test]
fn nothing_is_applied_while_a_frame_is_staged() {
    let mut m = begun(1);
    frame(&mut m, 1, 1);
    frame(&mut m, 2, 1);
    staged(&mut m, 1);
    m.handle(Input::End(end(1, 1)));
    check(&mut m, &[stage(1), stage(2)]); // one more than was counted: the peer's mistake
    staged(&mut m, 2);
    check(&mut m, &[]);
}

#[test]
fn a_failed_frame_fails_its_changeset_once() {
    let mut m = begun(1);
    frame(&mut m, 1, 1);
    frame(&mut m, 2, 1);
    check(&mut m, &[stage(1), stage(2)]);
    m.handle(Input::Staged { stream: StreamNo(1), result: Err("no room") });
    check(&mut m, &[Effect::Failed { seq: Seq(1), failure: "no room" }]);
    m.handle(Input::Staged { stream: StreamNo(2), result: Err("no room") });
    m.handle(Input::End(end(1, 2)));
    check(&mut m, &[]);
    frame(&mut m, 1, 1);
    check(&mut m, &[drop_of(1)]);
}

#[test]
fn a_begin_waits_until_nothing_is_staged() {
    let mut m = begun(1);
    frame(&mut m, 1, 1);
    check(&mut m, &[stage(1)]);
    m.handle(Input::Begin { seq: Seq(2), baseline: FULL, acked: Seq(0) });
    frame(&mut m, 2, 2);
    frame(&mut m, 3, 1);
    check(&mut m, &[drop_of(3)]);
    assert!(!m.takes_messages());
    staged(&mut m, 1);
    check(&mut m, &[Effect::Begin { seq: Seq(2), baseline: FULL, acked: Seq(0) }]);
    m.handle(Input::Begun(Ok(())));
    assert!(m.takes_messages());
    check(&mut m, &[stage(2)]);
}

#[test]
fn a_begin_that_failed_is_told_and_its_frames_are_dropped() {
    let mut m = Machine::new();
    frame(&mut m, 1, 3);
    m.handle(Input::Begin { seq: Seq(3), baseline: FULL, acked: Seq(0) });
    check(&mut m, &[Effect::Begin { seq: Seq(3), baseline: FULL, acked: Seq(0) }]);
    m.handle(Input::Begun(Err("out of order")));
    check(&mut m, &[Effect::Failed { seq: Seq(3), failure: "out of order" }, drop_of(1)]);
}

#[test]
fn what_is_being_applied_is_applied_and_told_whatever_comes() {
    let mut m = begun(1);
    m.handle(Input::End(end(1, 0)));
    check(&mut m, &[Effect::Finish(end(1, 0))]);
    m.handle(Input::Abandon { seq: Seq(1) });
    m.handle(Input::Begin { seq: Seq(2), baseline: FULL, acked: Seq(0) });
    check(&mut m, &[]);
    m.handle(Input::Finished(Ok(applied(1))));
    check(&mut m, &[Effect::Acked(applied(1)), Effect::Begin { seq: Seq(2), baseline: FULL, acked: Seq(0) }]);
}

#[test]
fn a_closed_link_lets_nothing_in_and_gives_up_after_all_is_staged() {
    let mut m = begun(1);
    frame(&mut m, 1, 1);
    frame(&mut m, 2, 7);
    check(&mut m, &[stage(1)]);
    m.handle(Input::Closed);
    frame(&mut m, 3, 1);
    check(&mut m, &[drop_of(2), drop_of(3)]);
    staged(&mut m, 1);
    check(&mut m, &[Effect::Abandon]);
    assert!(!m.is_closed());
    m.handle(Input::Abandoned);
    check(&mut m, &[]);
    assert!(m.is_closed());
}

#[test]
fn a_link_that_closes_in_the_midst_of_a_begin_leaves_nothing_begun() {
    let mut m = Machine::new();
    m.handle(Input::Begin { seq: Seq(1), baseline: FULL, acked: Seq(0) });
    m.handle(Input::Closed);
    m.handle(Input::Begun(Ok(())));
    check(&mut m, &[Effect::Begin { seq: Seq(1), baseline: FULL, acked: Seq(0) }, Effect::Abandon]);
    m.handle(Input::Abandoned);
    assert!(m.is_closed());
}

/// Random inputs: each frame is staged or dropped once, what is told was begun, and in the end the link closes.
#[test]
fn every_frame_is_staged_or_dropped_once_and_every_link_closes() {
    for seed in 1..2000u64 {
        let mut world = World { random: seed, ..World::default() };
        for _ in 0..120 {
            world.step();
        }
        world.input(Input::Closed);
        while !world.todo.is_empty() {
            world.perform_one();
        }
        assert!(world.machine.is_closed(), "seed {seed}");
        assert!(world.waiting.is_empty(), "seed {seed}: {:?}", world.waiting);
    }
}

#[derive(Default)]
struct World {
    random: u64,
    machine: Machine,
    /// Effects that were decided and not yet performed.
    todo: Vec<Effect<&'static str>>,
    /// Streams that wait for an effect.
    waiting: BTreeSet<StreamNo>,
    begun: u64,
    staged: BTreeMap<u64, u64>,
    told: BTreeSet<Seq>,
}

impl World {
    fn below(&mut self, end: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % end
    }

    fn input(&mut self, input: Input<&'static str>) {
        self.machine.handle(input);
        while let Some(effect) = self.machine.poll_effect() {
            match effect {
                Effect::Drop { stream } => assert!(self.waiting.remove(&stream)),
                Effect::Acked(Applied { seq, .. }) | Effect::Failed { seq, .. } => assert!(self.told.insert(seq), "{seq} told twice"),
                effect => {
                    let alone = !matches!(effect, Effect::Stage { .. });
                    assert!(!alone || self.todo.is_empty(), "{effect:?} during {:?}", self.todo);
                    self.todo.push(effect);
                }
            }
        }
    }

    fn step(&mut self) {
        match self.below(8) {
            0 if self.machine.takes_messages() => {
                self.begun += 1 + self.below(2);
                self.input(Input::Begin { seq: Seq(self.begun), baseline: FULL, acked: Seq(0) });
            }
            1 if self.machine.takes_messages() => {
                let sent = self.staged.get(&self.begun).copied().unwrap_or_default();
                let batches = sent + self.below(2);
                self.input(Input::End(end(self.begun, batches)));
            }
            2 if self.machine.takes_messages() && self.below(3) == 0 => self.input(Input::Abandon { seq: Seq(self.begun) }),
            3..5 => {
                let (stream, seq) = (StreamNo(self.below(4)), Seq(self.begun + self.below(3)));
                if self.waiting.insert(stream) {
                    self.input(Input::Arrived { stream, seq, kind: FrameKind::Batch });
                }
            }
            _ => self.perform_one(),
        }
    }

    fn perform_one(&mut self) {
        if self.todo.is_empty() {
            return;
        }
        let at = self.below(self.todo.len() as u64) as usize;
        let failed = self.below(6) == 0;
        let outcome = if failed { Err("failed") } else { Ok(()) };
        match self.todo.remove(at) {
            Effect::Begin { .. } => self.input(Input::Begun(outcome)),
            Effect::Stage { stream } => {
                assert!(self.waiting.remove(&stream));
                *self.staged.entry(self.begun).or_default() += u64::from(!failed);
                self.input(Input::Staged { stream, result: outcome });
            }
            Effect::Finish(end) => self.input(Input::Finished(outcome.map(|()| applied(end.seq.0)))),
            Effect::Abandon => self.input(Input::Abandoned),
            effect => panic!("{effect:?} is no work"),
        }
    }
}
