//! The active's side of replication as a state machine: when to connect, what to capture, what is confirmed.
//!
//! Decides; performs nothing. Inputs come through [`Follow::handle`], what is to be done comes out of
//! [`Follow::poll_effect`] until it is `None`, and [`Follow::poll_timeout`] says when to call `handle` with
//! [`Input::Tick`] at the latest. The outcome of each effect comes back as an input.
//!
//! It must not know paths, sockets, files or the wall clock.
//!
//! Invariants:
//! - at most one cycle is under way; it begins while the link is up, and while its capture runs no other begins;
//! - a checkpoint is confirmed only by an acknowledgement of a cycle that began after it was asked for, or by such a
//!   cycle finding nothing to send (G3, G7);
//! - what a failed cycle covered is covered again by a later one: no hint is lost.

use std::collections::VecDeque;
use std::time::Duration;

use crate::changeset::Baseline;
use crate::control::Applied;
use crate::id::{Seq, SessionId};
use crate::seeded_bug;

/// What a cycle looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// What the watch reported.
    Hinted,
    /// Every directory of every root.
    Everything,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// The standby answered with what it has.
    Opened {
        /// Its last changeset.
        applied: Option<Applied>,
    },
    /// The link is gone, or could not be made. A capture that is under way still ends with an input of its own.
    Lost,
    /// The watch reported changes.
    Hints,
    /// The watch may have missed changes: only a look at everything helps.
    Uncovered,
    /// The cycle's content has been handed over and the standby owes an answer; or nothing had changed.
    Captured {
        /// Whether a changeset was sent.
        sent: Sent,
        /// Whether all that the cycle covers is in it.
        extent: Extent,
    },
    /// The cycle could not be finished, the link may be fine.
    CaptureFailed,
    /// The standby has applied the changeset durably.
    Acked {
        /// The changeset.
        seq: Seq,
    },
    /// The standby refused the changeset.
    Refused {
        /// The changeset.
        seq: Seq,
    },
    /// Somebody waits until all that was written before now is durable on the standby.
    Checkpoint {
        /// The caller's number for it.
        id: u64,
    },
    /// Time has passed.
    Tick,
}

/// Whether a cycle led to a changeset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sent {
    /// It did; an acknowledgement is owed.
    Changeset,
    /// Nothing differs from what the standby has.
    Nothing,
}

/// Whether a cycle brought all that it covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// It did.
    All,
    /// Something changed while it was read: another cycle has to bring it, and confirms what this one would have.
    Part,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Connect to the standby and open the session.
    Connect,
    /// Capture what changed and send it as changeset `seq`.
    Capture {
        /// Its number, should anything have changed.
        seq: Seq,
        /// What it starts from.
        baseline: Baseline,
        /// What to look at.
        scope: Scope,
    },
    /// Store that the standby has everything up to `seq`.
    RecordAcked {
        /// The changeset.
        seq: Seq,
    },
    /// Put what the failed cycle covered back among the hints.
    RestoreHints,
    /// Answer a checkpoint.
    Confirm {
        /// The caller's number for it.
        id: u64,
        /// The changeset that holds all that was asked for.
        seq: Seq,
    },
}

/// Times and what is remembered from before.
#[derive(Debug, Clone, Copy)]
pub struct FollowConfig {
    /// The session that this active has open.
    pub session: SessionId,
    /// The lowest number for the next changeset.
    pub next_seq: Seq,
    /// The last changeset that this index knows the standby to have; `None` when the index is new.
    pub acked: Option<Seq>,
    /// How long between looks at everything.
    pub full_scan_every: Duration,
    /// First wait before connecting again; doubles up to `retry_max`.
    pub retry_min: Duration,
    /// Longest wait before connecting again.
    pub retry_max: Duration,
}

/// The state machine; time is a `Duration` since any fixed moment.
#[derive(Debug)]
pub struct Follow {
    config: FollowConfig,
    link: Link,
    cycle: Option<Cycle>,
    /// What the next cycle has to look at.
    pending: Option<Scope>,
    baseline: Baseline,
    next_seq: Seq,
    last_acked: Seq,
    retry_after: Duration,
    full_scan_at: Duration,
    /// After a cycle that failed, when the next one may begin.
    pause_until: Duration,
    pause: Duration,
    /// Checkpoints that no cycle covers yet.
    asked: Vec<u64>,
    effects: VecDeque<Effect>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Down { retry_at: Duration },
    Connecting,
    Up,
}

#[derive(Debug)]
struct Cycle {
    seq: Seq,
    scope: Scope,
    phase: Phase,
    extent: Extent,
    /// Checkpoints that this cycle's end confirms.
    covers: Vec<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Capturing,
    /// The link was lost or the standby refused while the capture runs: when it ends, the cycle has failed.
    Doomed,
    AwaitingAck,
}

impl Follow {
    /// Begins with the link down and everything to be looked at: events of the time before are lost.
    pub fn new(config: FollowConfig, now: Duration) -> Follow {
        Follow {
            link: Link::Down { retry_at: now },
            cycle: None,
            pending: Some(Scope::Everything),
            baseline: Baseline::Full,
            next_seq: config.next_seq,
            last_acked: config.acked.unwrap_or_default(),
            retry_after: config.retry_min,
            full_scan_at: now + config.full_scan_every,
            pause_until: now,
            pause: config.retry_min,
            asked: Vec::new(),
            effects: VecDeque::new(),
            config,
        }
    }

    /// Takes one input.
    pub fn handle(&mut self, now: Duration, input: Input) {
        match input {
            Input::Opened { applied } => self.opened(applied),
            Input::Lost => self.lost(now),
            Input::Hints => self.want(Scope::Hinted),
            Input::Uncovered => self.want(Scope::Everything),
            Input::Captured { sent, extent } => {
                if let Some(cycle) = &mut self.cycle {
                    cycle.extent = extent;
                }
                self.capture_ended(now, Some(sent));
            }
            Input::CaptureFailed => self.capture_ended(now, None),
            Input::Acked { seq } => self.acked(now, seq),
            Input::Refused { seq } => {
                if self.cycle.as_ref().is_some_and(|c| c.seq == seq) {
                    self.pause(now);
                    self.abandon_cycle();
                }
            }
            Input::Checkpoint { id } => {
                let joined = self.cycle.as_mut().filter(|_| seeded_bug!(CheckpointsJoinTheCycle));
                joined.map_or(&mut self.asked, |cycle| &mut cycle.covers).push(id);
                self.want(Scope::Hinted);
            }
            Input::Tick => {}
        }
        self.advance(now);
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When to call `handle` with [`Input::Tick`] at the latest; `None` while only an input can change anything.
    pub fn poll_timeout(&self) -> Option<Duration> {
        match self.link {
            Link::Down { retry_at } => Some(retry_at),
            Link::Connecting => None,
            Link::Up if self.cycle.is_some() => None,
            Link::Up if self.pending.is_some() => Some(self.pause_until),
            Link::Up => Some(self.full_scan_at),
        }
    }

    /// Changes how long it is between looks at everything, from the next one on.
    pub fn set_full_scan_every(&mut self, now: Duration, every: Duration) {
        if every != self.config.full_scan_every {
            self.config.full_scan_every = every;
            self.full_scan_at = self.full_scan_at.min(now + every);
        }
    }

    /// Whether the link is up.
    pub fn is_up(&self) -> bool {
        self.link == Link::Up
    }

    /// Whether nothing is known that the standby lacks.
    pub fn is_idle(&self) -> bool {
        self.is_up() && self.cycle.is_none() && self.pending.is_none()
    }

    /// The last acknowledged changeset.
    pub fn last_acked(&self) -> Seq {
        self.last_acked
    }

    fn want(&mut self, scope: Scope) {
        self.pending = self.pending.max(Some(scope));
    }

    fn opened(&mut self, applied: Option<Applied>) {
        self.link = Link::Up;
        self.retry_after = self.config.retry_min;
        let mine = applied.filter(|a| a.session == self.config.session);
        // A delta needs both: the standby is in this session, and the index remembers what it was sent.
        self.baseline = match (mine, self.config.acked) {
            (Some(a), Some(known)) if known <= a.seq && a.seq < self.next_seq => Baseline::Delta(a.seq),
            _ => Baseline::Full,
        };
        if let Some(a) = applied {
            self.next_seq = self.next_seq.max(a.seq.next());
        }
        if let Baseline::Delta(seq) = self.baseline
            && seq > self.last_acked
        {
            // The acknowledgement was lost with the link.
            self.record_acked(seq);
        }
        if self.baseline == Baseline::Full {
            self.want(Scope::Everything);
        }
    }

    fn lost(&mut self, now: Duration) {
        self.abandon_cycle();
        self.link = Link::Down { retry_at: now + self.retry_after };
        self.retry_after = (self.retry_after * 2).min(self.config.retry_max);
    }

    fn capture_ended(&mut self, now: Duration, sent: Option<Sent>) {
        let Some(cycle) = &mut self.cycle else { return };
        match (cycle.phase, sent) {
            (Phase::AwaitingAck, _) => {}
            (Phase::Doomed, _) => {
                cycle.phase = Phase::AwaitingAck; // nothing runs any more: it can be given up
                self.abandon_cycle();
            }
            (Phase::Capturing, Some(Sent::Changeset)) => cycle.phase = Phase::AwaitingAck,
            (Phase::Capturing, Some(Sent::Nothing)) => {
                let (seq, extent) = (self.last_acked, cycle.extent);
                self.end_cycle(now, seq);
                if extent == Extent::Part {
                    self.pause(now); // nothing came of it: the next try may as well find another moment
                }
            }
            (Phase::Capturing, None) => {
                cycle.phase = Phase::AwaitingAck;
                self.pause(now);
                self.abandon_cycle();
            }
        }
    }

    fn acked(&mut self, now: Duration, seq: Seq) {
        if self.cycle.as_ref().is_none_or(|c| c.seq != seq || c.phase != Phase::AwaitingAck) {
            return; // of a cycle that was given up; what it covered is looked at again
        }
        self.record_acked(seq);
        self.baseline = Baseline::Delta(seq);
        self.end_cycle(now, seq);
    }

    fn record_acked(&mut self, seq: Seq) {
        self.last_acked = seq;
        self.config.acked = Some(seq);
        self.next_seq = self.next_seq.max(seq.next());
        self.effects.push_back(Effect::RecordAcked { seq });
    }

    fn end_cycle(&mut self, now: Duration, seq: Seq) {
        let Some(cycle) = self.cycle.take() else { return };
        self.pause = self.config.retry_min;
        if cycle.scope == Scope::Everything {
            self.full_scan_at = now + self.config.full_scan_every;
        }
        if cycle.extent == Extent::Part && !seeded_bug!(PartCountsAsAll) {
            // What is left was hinted once more.
            self.want(Scope::Hinted);
            self.asked.extend(cycle.covers);
            return;
        }
        self.effects.extend(cycle.covers.into_iter().map(|id| Effect::Confirm { id, seq }));
    }

    /// Lets some time pass before the next cycle: what failed may well fail again.
    fn pause(&mut self, now: Duration) {
        self.pause_until = now + self.pause;
        self.pause = (self.pause * 2).min(self.config.retry_max);
    }

    /// Gives the cycle up, at once or as soon as its capture ends.
    fn abandon_cycle(&mut self) {
        if let Some(cycle) = &mut self.cycle
            && cycle.phase == Phase::Capturing
        {
            cycle.phase = Phase::Doomed;
        }
        let Some(cycle) = self.cycle.take_if(|c| c.phase == Phase::AwaitingAck) else { return };
        self.want(cycle.scope);
        self.effects.push_back(Effect::RestoreHints);
        self.asked.extend(cycle.covers);
        // A number is never used twice: the standby may have staged some of it.
        self.next_seq = self.next_seq.max(cycle.seq.next());
    }

    fn advance(&mut self, now: Duration) {
        match self.link {
            Link::Down { retry_at } if retry_at <= now => {
                self.link = Link::Connecting;
                self.effects.push_back(Effect::Connect);
            }
            Link::Up if self.cycle.is_none() && self.pause_until <= now => {
                if self.full_scan_at <= now {
                    self.want(Scope::Everything);
                }
                if let Some(scope) = self.pending.take() {
                    let seq = self.next_seq;
                    self.cycle =
                        Some(Cycle { seq, scope, phase: Phase::Capturing, extent: Extent::All, covers: std::mem::take(&mut self.asked) });
                    self.effects.push_back(Effect::Capture { seq, baseline: self.baseline, scope });
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINE: SessionId = SessionId([1; 16]);
    const T0: Duration = Duration::ZERO;

    fn follow(next_seq: u64, acked: Option<u64>) -> Follow {
        let config = FollowConfig {
            session: MINE,
            next_seq: Seq(next_seq),
            acked: acked.map(Seq),
            full_scan_every: Duration::from_secs(600),
            retry_min: Duration::from_millis(200),
            retry_max: Duration::from_secs(5),
        };
        Follow::new(config, T0)
    }

    fn applied(seq: u64) -> Option<Applied> {
        Some(Applied { session: MINE, seq: Seq(seq), as_of_ms: 0 })
    }

    fn effects(f: &mut Follow) -> Vec<Effect> {
        std::iter::from_fn(|| f.poll_effect()).collect()
    }

    /// A machine whose first look at everything found nothing.
    fn idle() -> Follow {
        let mut f = follow(8, Some(7));
        f.handle(T0, Input::Tick);
        f.handle(T0, Input::Opened { applied: applied(7) });
        f.handle(T0, Input::Captured { sent: Sent::Nothing, extent: Extent::All });
        effects(&mut f);
        assert!(f.is_idle());
        f
    }

    fn check_baseline(mut f: Follow, applied: Option<Applied>, expected: (u64, Baseline)) {
        f.handle(T0, Input::Tick);
        f.handle(T0, Input::Opened { applied });
        let capture = effects(&mut f).pop().unwrap();
        let (seq, baseline) = expected;
        assert_eq!(capture, Effect::Capture { seq: Seq(seq), baseline, scope: Scope::Everything });
    }

    #[test]
    fn a_delta_needs_a_common_past() {
        check_baseline(follow(8, Some(7)), applied(7), (8, Baseline::Delta(Seq(7))));
        check_baseline(follow(9, Some(7)), applied(8), (9, Baseline::Delta(Seq(8))));
        check_baseline(follow(1, None), None, (1, Baseline::Full));
        check_baseline(follow(1, None), applied(7), (8, Baseline::Full)); // the index was lost
        check_baseline(follow(8, Some(7)), None, (8, Baseline::Full)); // the standby was made anew
        check_baseline(follow(8, Some(7)), applied(6), (8, Baseline::Full)); // the standby was put back
        check_baseline(follow(8, Some(7)), applied(9), (10, Baseline::Full)); // the index was put back
        let other = Applied { session: SessionId([2; 16]), seq: Seq(7), as_of_ms: 0 };
        check_baseline(follow(8, Some(7)), Some(other), (8, Baseline::Full));
    }

    #[test]
    fn a_checkpoint_waits_for_a_cycle_that_began_after_it() {
        let mut f = idle();
        f.handle(T0, Input::Hints);
        assert_eq!(effects(&mut f), [Effect::Capture { seq: Seq(8), baseline: Baseline::Delta(Seq(7)), scope: Scope::Hinted }]);
        f.handle(T0, Input::Checkpoint { id: 1 });
        f.handle(T0, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
        f.handle(T0, Input::Acked { seq: Seq(8) });
        let next = Effect::Capture { seq: Seq(9), baseline: Baseline::Delta(Seq(8)), scope: Scope::Hinted };
        assert_eq!(effects(&mut f), [Effect::RecordAcked { seq: Seq(8) }, next]);
        f.handle(T0, Input::Captured { sent: Sent::Nothing, extent: Extent::All });
        assert_eq!(effects(&mut f), [Effect::Confirm { id: 1, seq: Seq(8) }]);
    }

    #[test]
    fn a_checkpoint_waits_for_what_a_cycle_left_to_the_next() {
        let mut f = idle();
        f.handle(T0, Input::Checkpoint { id: 1 });
        f.handle(T0, Input::Captured { sent: Sent::Changeset, extent: Extent::Part });
        f.handle(T0, Input::Acked { seq: Seq(8) });
        let capture = |seq, from| Effect::Capture { seq: Seq(seq), baseline: Baseline::Delta(Seq(from)), scope: Scope::Hinted };
        assert_eq!(effects(&mut f), [capture(8, 7), Effect::RecordAcked { seq: Seq(8) }, capture(9, 8)]);
        f.handle(T0, Input::Captured { sent: Sent::Nothing, extent: Extent::Part });
        assert_eq!(effects(&mut f), [], "a moment passes when nothing came of a try");
        let at = f.poll_timeout().unwrap();
        f.handle(at, Input::Tick);
        f.handle(at, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
        f.handle(at, Input::Acked { seq: Seq(9) });
        assert_eq!(effects(&mut f), [capture(9, 8), Effect::RecordAcked { seq: Seq(9) }, Effect::Confirm { id: 1, seq: Seq(9) }]);
    }

    #[test]
    fn a_lost_link_loses_no_hint_and_no_checkpoint() {
        let mut f = idle();
        f.handle(T0, Input::Checkpoint { id: 5 });
        effects(&mut f);
        f.handle(T0, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
        f.handle(T0, Input::Lost);
        assert_eq!(effects(&mut f), [Effect::RestoreHints]);
        f.handle(T0, Input::Acked { seq: Seq(8) }); // too late: ignored
        assert_eq!(effects(&mut f), []);
        let at = f.poll_timeout().unwrap();
        f.handle(at, Input::Tick);
        assert_eq!(effects(&mut f), [Effect::Connect]);
        f.handle(at, Input::Opened { applied: applied(8) });
        let again = Effect::Capture { seq: Seq(9), baseline: Baseline::Delta(Seq(8)), scope: Scope::Hinted };
        assert_eq!(effects(&mut f), [Effect::RecordAcked { seq: Seq(8) }, again]);
        f.handle(at, Input::Captured { sent: Sent::Nothing, extent: Extent::All });
        assert_eq!(effects(&mut f), [Effect::Confirm { id: 5, seq: Seq(8) }]);
    }

    #[test]
    fn no_cycle_begins_while_an_earlier_capture_runs() {
        let mut f = idle();
        f.handle(T0, Input::Hints);
        f.handle(T0, Input::Checkpoint { id: 3 });
        effects(&mut f);
        f.handle(T0, Input::Lost);
        let at = f.poll_timeout().unwrap();
        f.handle(at, Input::Tick);
        f.handle(at, Input::Opened { applied: applied(7) });
        // The hints can't be put back before the capture that took them has ended.
        assert_eq!(effects(&mut f), [Effect::Connect]);
        f.handle(at, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
        let again = Effect::Capture { seq: Seq(9), baseline: Baseline::Delta(Seq(7)), scope: Scope::Hinted };
        assert_eq!(effects(&mut f), [Effect::RestoreHints, again]);
        f.handle(at, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
        f.handle(at, Input::Acked { seq: Seq(9) });
        assert!(effects(&mut f).contains(&Effect::Confirm { id: 3, seq: Seq(9) }));
    }

    #[test]
    fn waits_between_connections_grow_to_a_limit() {
        let mut f = follow(1, None);
        let mut now = T0;
        let mut waits = Vec::new();
        for _ in 0..8 {
            f.handle(now, Input::Tick);
            f.handle(now, Input::Lost);
            waits.push((f.poll_timeout().unwrap() - now).as_millis());
            now = f.poll_timeout().unwrap();
        }
        assert_eq!(waits, [200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
    }

    #[test]
    fn a_cycle_that_failed_is_tried_again_after_a_pause() {
        let mut f = idle();
        f.handle(T0, Input::Hints);
        effects(&mut f);
        f.handle(T0, Input::CaptureFailed);
        assert_eq!(effects(&mut f), [Effect::RestoreHints]);
        let at = f.poll_timeout().unwrap();
        assert_eq!(at, Duration::from_millis(200));
        f.handle(at, Input::Tick);
        let again = Effect::Capture { seq: Seq(9), baseline: Baseline::Delta(Seq(7)), scope: Scope::Hinted };
        assert_eq!(effects(&mut f), [again]);
        f.handle(at, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
        f.handle(at, Input::Refused { seq: Seq(9) });
        assert_eq!(f.poll_timeout().unwrap() - at, Duration::from_millis(400));
    }

    #[test]
    fn everything_is_looked_at_again_after_a_while() {
        let mut f = idle();
        let at = f.poll_timeout().unwrap();
        assert_eq!(at, Duration::from_secs(600));
        f.handle(at, Input::Tick);
        assert!(matches!(effects(&mut f)[..], [Effect::Capture { scope: Scope::Everything, .. }]));
    }

    /// Random inputs, with hints as a set of numbers that captures take: whatever happens, once the world behaves again
    /// every hint reached the standby, and every checkpoint was confirmed once, with all that was hinted before it.
    #[test]
    fn no_hint_is_lost_and_every_checkpoint_is_confirmed_once() {
        for seed in 1..2000u64 {
            let mut world = World::new(seed);
            for step in 0..240 {
                world.step(step >= 100);
            }
            assert_eq!(world.on_standby.len(), world.hinted, "seed {seed}: hints were lost");
            world.confirmed.sort_unstable();
            assert_eq!(world.confirmed, (0..world.asked).collect::<Vec<_>>(), "seed {seed}");
        }
    }

    struct World {
        random: u64,
        machine: Follow,
        now: Duration,
        hinted: usize,
        /// Hints that no capture has taken.
        dirty: Vec<usize>,
        /// Hints of the running capture, which are handed over when it ends, and of the cycle after that.
        running: Option<(Seq, Vec<usize>)>,
        taken: Vec<usize>,
        owed: Option<Seq>,
        on_standby: std::collections::BTreeSet<usize>,
        applied: Option<Applied>,
        asked: u64,
        asked_at: Vec<usize>,
        confirmed: Vec<u64>,
    }

    impl World {
        fn new(seed: u64) -> World {
            World {
                random: seed,
                machine: follow(1, None),
                now: T0,
                hinted: 0,
                dirty: Vec::new(),
                running: None,
                taken: Vec::new(),
                owed: None,
                on_standby: std::collections::BTreeSet::new(),
                applied: None,
                asked: 0,
                asked_at: Vec::new(),
                confirmed: Vec::new(),
            }
        }

        fn chance(&mut self, one_in: u64) -> bool {
            self.random ^= self.random << 13;
            self.random ^= self.random >> 7;
            self.random ^= self.random << 17;
            self.random.is_multiple_of(one_in)
        }

        fn input(&mut self, input: Input) {
            self.machine.handle(self.now, input);
            while let Some(effect) = self.machine.poll_effect() {
                match effect {
                    Effect::Connect => self.machine.handle(self.now, Input::Opened { applied: self.applied }),
                    Effect::Capture { seq, .. } => {
                        assert!(self.running.is_none(), "two captures at once");
                        self.running = Some((seq, std::mem::take(&mut self.dirty)));
                    }
                    Effect::RestoreHints => self.dirty.append(&mut self.taken),
                    Effect::Confirm { id, .. } => {
                        let asked_at = self.asked_at[usize::try_from(id).unwrap()];
                        assert!((0..asked_at).all(|hint| self.on_standby.contains(&hint)), "confirmed too early");
                        self.confirmed.push(id);
                    }
                    Effect::RecordAcked { .. } => {}
                }
            }
        }

        fn step(&mut self, calm: bool) {
            let quick = self.chance(2);
            self.now += Duration::from_millis(if quick { 50 } else { 1500 });
            self.input(Input::Tick);
            if !calm && self.chance(3) {
                self.dirty.push(self.hinted);
                self.hinted += 1;
                self.input(Input::Hints);
            }
            if !calm && self.chance(5) {
                self.asked_at.push(self.hinted);
                self.asked += 1;
                self.input(Input::Checkpoint { id: self.asked - 1 });
            }
            if !calm && self.chance(7) {
                // A changeset may have been applied although nobody hears of it.
                if self.chance(2) {
                    self.apply();
                }
                self.owed = None;
                self.input(Input::Lost);
            }
            if self.running.is_some() && self.chance(2) {
                self.end_capture(calm);
            } else if let Some(seq) = self.owed.filter(|_| self.chance(2)) {
                if calm || !self.chance(4) {
                    self.apply();
                    self.owed = None;
                    self.input(Input::Acked { seq });
                } else {
                    self.owed = None;
                    self.input(Input::Refused { seq });
                }
            }
        }

        fn apply(&mut self) {
            if let Some(seq) = self.owed {
                self.on_standby.extend(self.taken.iter().copied());
                self.applied = Some(Applied { session: MINE, seq, as_of_ms: 0 });
            }
        }

        fn end_capture(&mut self, calm: bool) {
            let Some((seq, hints)) = self.running.take() else { return };
            let failed = !calm && self.chance(4);
            let lacking = hints.iter().any(|h| !self.on_standby.contains(h));
            self.taken = hints;
            if failed {
                return self.input(Input::CaptureFailed);
            }
            if lacking && self.machine.is_up() {
                self.owed = Some(seq);
            }
            let sent = if lacking { Sent::Changeset } else { Sent::Nothing };
            self.input(Input::Captured { sent, extent: Extent::All });
            if self.machine.cycle.as_ref().is_none_or(|c| c.seq != seq) {
                self.owed = None; // the machine had given it up
            }
        }
    }
}
