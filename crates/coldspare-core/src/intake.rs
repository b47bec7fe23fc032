//! The standby's side of a session as a state machine: which frame is staged, what waits, when a changeset is applied,
//! what the active is told.
//!
//! Frames of a changeset may arrive before its `Begin` and after its `End`: the first wait, the changeset ends when all
//! that `End` counted has come. Frames of a changeset that is over are dropped.
//!
//! Decides; performs nothing. Inputs come through [`Intake::handle`], what is to be done comes out of
//! [`Intake::poll_effect`] until it is `None`; the outcome of each effect comes back as an input. A message of the
//! control stream is given to it only while [`Intake::takes_messages`], a frame of a data stream only once the one before
//! it was staged or dropped: the driver waits, and so the active does.
//!
//! It must not know content, sockets, files or time; `F` is a failure that it passes on.
//!
//! Invariants:
//! - at most one frame a stream is held;
//! - a changeset begins, and is given up, only while nothing is staged or applied;
//! - it is applied once, when all that `End` counted was staged without a failure, and acknowledged only then (G3);
//! - each changeset that was begun is answered at most once, and what was applied or failed is told, whether or not it
//!   was given up meanwhile.

use std::collections::{BTreeMap, VecDeque};

use crate::changeset::{Baseline, Totals};
use crate::control::Applied;
use crate::id::Seq;
use crate::seeded_bug;

/// A data stream of the session, by any number that is its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamNo(pub u64);

/// What a frame is, as `End` counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// Operations with the content of small files.
    Batch,
    /// A stretch of a large file.
    Segment,
}

/// What a changeset amounts to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Its number.
    pub seq: Seq,
    /// Milliseconds since 1970 on the active's clock.
    pub as_of_ms: u64,
    /// Batches that were sent.
    pub batches: u64,
    /// Segments that were sent.
    pub segments: u64,
    /// What both ends compare.
    pub totals: Totals,
}

/// What happened.
#[derive(Debug)]
pub enum Input<F> {
    /// The active announces a changeset; one that is under way is given up.
    Begin {
        /// Its number.
        seq: Seq,
        /// What it starts from.
        baseline: Baseline,
    },
    /// The outcome of [`Effect::Begin`].
    Begun(Result<(), F>),
    /// A frame arrived; it waits for an effect of its stream.
    Arrived {
        /// Where.
        stream: StreamNo,
        /// The changeset that it belongs to.
        seq: Seq,
        /// What it is.
        kind: FrameKind,
    },
    /// The outcome of [`Effect::Stage`].
    Staged {
        /// Where the frame came from.
        stream: StreamNo,
        /// Whether its content is staged.
        result: Result<(), F>,
    },
    /// The active has sent all of the changeset.
    End(End),
    /// The active gives the changeset up.
    Abandon {
        /// The changeset.
        seq: Seq,
    },
    /// [`Effect::Abandon`] was performed.
    Abandoned,
    /// The outcome of [`Effect::Finish`].
    Finished(Result<Applied, F>),
    /// The link is gone: no further frame is let in, and what was begun is given up.
    Closed,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Effect<F> {
    /// Begin to stage a changeset.
    Begin {
        /// Its number.
        seq: Seq,
        /// What it starts from.
        baseline: Baseline,
    },
    /// Stage the frame that this stream holds.
    Stage {
        /// The stream.
        stream: StreamNo,
    },
    /// Drop the frame that this stream holds and let it read on.
    Drop {
        /// The stream.
        stream: StreamNo,
    },
    /// Commit and apply the changeset, all of which is staged.
    Finish(End),
    /// End the staging of what was begun; what is staged may be kept.
    Abandon,
    /// Tell the active that all of the changeset is durable.
    Acked(Applied),
    /// Tell the active that the changeset was not applied.
    Failed {
        /// The changeset.
        seq: Seq,
        /// Why.
        failure: F,
    },
}

/// One session's intake.
#[derive(Debug)]
pub struct Intake<F> {
    /// The changeset under way: begun, not yet complete, not failed.
    current: Option<Current>,
    /// The last changeset that was begun, or was to be; frames of later ones wait for it.
    begun: Seq,
    /// Frames that wait for their changeset to begin.
    held: BTreeMap<StreamNo, Frame>,
    /// Frames that are being staged.
    staging: BTreeMap<StreamNo, Frame>,
    /// What is done once nothing is staged or applied.
    wanted: Option<Wanted>,
    /// The one thing that is being done to the changeset as a whole.
    doing: Option<Doing>,
    link: Link,
    effects: VecDeque<Effect<F>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Up,
    /// Gone; what was begun is being given up.
    Closing,
    Closed,
}

#[derive(Debug)]
struct Current {
    seq: Seq,
    batches: u64,
    segments: u64,
    end: Option<End>,
}

#[derive(Debug, Clone, Copy)]
struct Frame {
    seq: Seq,
    kind: FrameKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Begin { seq: Seq, baseline: Baseline },
    Abandon,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Doing {
    Beginning(Seq),
    Finishing(Seq),
    Abandoning,
}

impl<F> Default for Intake<F> {
    fn default() -> Intake<F> {
        Intake::new()
    }
}

impl<F> Intake<F> {
    /// Begins with nothing under way.
    pub fn new() -> Intake<F> {
        Intake {
            current: None,
            begun: Seq(0),
            held: BTreeMap::new(),
            staging: BTreeMap::new(),
            wanted: None,
            doing: None,
            link: Link::Up,
            effects: VecDeque::new(),
        }
    }

    /// Takes one input.
    pub fn handle(&mut self, input: Input<F>) {
        match input {
            Input::Begin { seq, baseline } => self.begin(seq, baseline),
            Input::Begun(result) => self.begin_ended(result),
            Input::Arrived { stream, seq, kind } => self.arrived(stream, Frame { seq, kind }),
            Input::Staged { stream, result } => self.staged(stream, result),
            Input::End(end) => {
                if let Some(current) = self.current.as_mut().filter(|c| c.seq == end.seq) {
                    current.end = Some(end);
                }
            }
            Input::Abandon { seq } => {
                if self.current.take_if(|c| c.seq == seq).is_some() {
                    self.wanted = Some(Wanted::Abandon);
                }
            }
            Input::Abandoned => {
                let done = self.doing.take();
                assert_eq!(done, Some(Doing::Abandoning), "nothing was being given up");
                if self.link == Link::Closing && self.wanted.is_none() {
                    self.link = Link::Closed;
                }
            }
            Input::Finished(result) => self.finished(result),
            Input::Closed => self.close(),
        }
        self.advance();
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<Effect<F>> {
        self.effects.pop_front()
    }

    /// Whether the next message of the control stream may be given to it, or acted on.
    pub fn takes_messages(&self) -> bool {
        self.wanted.is_none() && !matches!(self.doing, Some(Doing::Beginning(_) | Doing::Abandoning))
    }

    /// Whether the link is gone and nothing more will be done.
    pub fn is_closed(&self) -> bool {
        self.link == Link::Closed
    }

    fn begin(&mut self, seq: Seq, baseline: Baseline) {
        assert!(self.takes_messages(), "a message while the one before it is acted on");
        if self.link == Link::Up {
            self.current = None;
            self.wanted = Some(Wanted::Begin { seq, baseline });
        }
    }

    fn begin_ended(&mut self, result: Result<(), F>) {
        let Some(Doing::Beginning(seq)) = self.doing.take() else { panic!("no changeset was being begun") };
        self.begun = seq;
        match result {
            Ok(()) if self.link == Link::Up => self.current = Some(Current { seq, batches: 0, segments: 0, end: None }),
            Ok(()) => {}
            Err(failure) => self.effects.push_back(Effect::Failed { seq, failure }),
        }
        for (stream, frame) in std::mem::take(&mut self.held) {
            self.arrived(stream, frame);
        }
    }

    fn arrived(&mut self, stream: StreamNo, frame: Frame) {
        assert!(!self.held.contains_key(&stream) && !self.staging.contains_key(&stream), "a second frame of a stream");
        if self.link != Link::Up {
            self.effects.push_back(Effect::Drop { stream });
        } else if frame.seq > self.begun {
            self.held.insert(stream, frame);
        } else if self.current.as_ref().is_some_and(|c| c.seq == frame.seq) {
            self.staging.insert(stream, frame);
            self.effects.push_back(Effect::Stage { stream });
        } else {
            self.effects.push_back(Effect::Drop { stream }); // of a changeset that is over
        }
    }

    fn staged(&mut self, stream: StreamNo, result: Result<(), F>) {
        let Some(frame) = self.staging.remove(&stream) else { panic!("no frame of this stream was being staged") };
        let Some(current) = self.current.as_mut().filter(|c| c.seq == frame.seq) else { return };
        match result {
            Ok(()) => {
                *(match frame.kind {
                    FrameKind::Batch => &mut current.batches,
                    FrameKind::Segment => &mut current.segments,
                }) += 1;
            }
            Err(failure) => {
                self.current = None;
                self.effects.push_back(Effect::Failed { seq: frame.seq, failure });
            }
        }
    }

    fn finished(&mut self, result: Result<Applied, F>) {
        let Some(Doing::Finishing(seq)) = self.doing.take() else { panic!("no changeset was being applied") };
        self.effects.push_back(match result {
            Ok(applied) => Effect::Acked(applied),
            Err(failure) => Effect::Failed { seq, failure },
        });
    }

    fn close(&mut self) {
        if self.link != Link::Up {
            return;
        }
        self.link = Link::Closing;
        self.current = None;
        self.wanted = Some(Wanted::Abandon);
        for (stream, _) in std::mem::take(&mut self.held) {
            self.effects.push_back(Effect::Drop { stream });
        }
    }

    /// Does what waited for the frames in staging, or for the changeset that is being applied.
    fn advance(&mut self) {
        if !self.staging.is_empty() || self.doing.is_some() {
            return;
        }
        match self.wanted.take() {
            Some(Wanted::Begin { seq, baseline }) => {
                self.doing = Some(Doing::Beginning(seq));
                self.effects.push_back(Effect::Begin { seq, baseline });
            }
            Some(Wanted::Abandon) => {
                self.doing = Some(Doing::Abandoning);
                self.effects.push_back(Effect::Abandon);
            }
            None => {
                let has_all =
                    |c: &Current, end: End| (c.batches, c.segments) == (end.batches, end.segments) || seeded_bug!(EndsBeforeAllFrames);
                let is_complete = |c: &mut Current| c.end.is_some_and(|end| has_all(c, end));
                if let Some(Current { seq, end: Some(end), .. }) = self.current.take_if(is_complete) {
                    self.doing = Some(Doing::Finishing(seq));
                    self.effects.push_back(Effect::Finish(end));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
        machine.handle(Input::Begin { seq: Seq(seq), baseline: FULL });
        check(machine, &[Effect::Begin { seq: Seq(seq), baseline: FULL }]);
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
        m.handle(Input::Begin { seq: Seq(2), baseline: FULL });
        frame(&mut m, 2, 2);
        frame(&mut m, 3, 1);
        check(&mut m, &[drop_of(3)]);
        assert!(!m.takes_messages());
        staged(&mut m, 1);
        check(&mut m, &[Effect::Begin { seq: Seq(2), baseline: FULL }]);
        m.handle(Input::Begun(Ok(())));
        assert!(m.takes_messages());
        check(&mut m, &[stage(2)]);
    }

    #[test]
    fn a_begin_that_failed_is_told_and_its_frames_are_dropped() {
        let mut m = Machine::new();
        frame(&mut m, 1, 3);
        m.handle(Input::Begin { seq: Seq(3), baseline: FULL });
        check(&mut m, &[Effect::Begin { seq: Seq(3), baseline: FULL }]);
        m.handle(Input::Begun(Err("out of order")));
        check(&mut m, &[Effect::Failed { seq: Seq(3), failure: "out of order" }, drop_of(1)]);
    }

    #[test]
    fn what_is_being_applied_is_applied_and_told_whatever_comes() {
        let mut m = begun(1);
        m.handle(Input::End(end(1, 0)));
        check(&mut m, &[Effect::Finish(end(1, 0))]);
        m.handle(Input::Abandon { seq: Seq(1) });
        m.handle(Input::Begin { seq: Seq(2), baseline: FULL });
        check(&mut m, &[]);
        m.handle(Input::Finished(Ok(applied(1))));
        check(&mut m, &[Effect::Acked(applied(1)), Effect::Begin { seq: Seq(2), baseline: FULL }]);
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
        m.handle(Input::Begin { seq: Seq(1), baseline: FULL });
        m.handle(Input::Closed);
        m.handle(Input::Begun(Ok(())));
        check(&mut m, &[Effect::Begin { seq: Seq(1), baseline: FULL }, Effect::Abandon]);
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
                    self.input(Input::Begin { seq: Seq(self.begun), baseline: FULL });
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
}
