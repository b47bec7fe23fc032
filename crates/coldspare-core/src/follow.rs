//! The active's side of replication as a state machine: when to connect, what to capture, what is confirmed.
//!
//! Decides; performs nothing. Inputs come through [`Follow::handle`], what is to be done comes out of
//! [`Follow::poll_effect`] until it is `None`, and [`Follow::poll_timeout`] says when to call `handle` with
//! [`Input::Tick`] at the latest. The outcome of each effect comes back as an input.
//!
//! It must not know paths, sockets, files or the wall clock.
//!
//! Invariants:
//! - a cycle begins while the link is up, and while its capture runs no other begins; up to [`IN_FLIGHT_MAX`] are under way,
//!   each from the changeset of the one before;
//! - a cycle ends after those before it; when one fails, so do those behind it;
//! - a checkpoint is confirmed only by an acknowledgement of a cycle that began after it was asked for, or by such a
//!   cycle finding nothing to send (G3, G7);
//! - what a failed cycle covered is covered again by a later one: no hint is lost;
//! - both trees are compared only while no cycle is under way and the standby is known to stand at a changeset.

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
    /// The standby waits for a person to decide about the changeset.
    Held {
        /// The changeset.
        seq: Seq,
    },
    /// Somebody waits until all that was written before now is durable on the standby.
    Checkpoint {
        /// The caller's number for it.
        id: u64,
    },
    /// The standby wants both trees compared at one changeset.
    Compare,
    /// What is to be compared was taken on both sides, or will not be.
    Compared,
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
    /// As `Part`, but there is nothing to do for it before further hints come: its content is being sent as bulk.
    PutOff,
}

impl Extent {
    /// What a cycle covers that left something to the next, or of which something, at its begin or since, was put off; in the
    /// second case it matters whether anything is put off still.
    pub fn of(is_left: bool, was_put_off: bool, is_put_off: bool) -> Extent {
        match (is_left, was_put_off) {
            (false, false) => Extent::All,
            (false, true) if is_put_off => Extent::PutOff,
            // RACE: what was put off when the cycle began may have been hinted again before it took the hints: then no
            // further ones come.
            (true, _) | (false, true) => Extent::Part,
        }
    }
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
    /// Put what the failed cycle `seq` covered back among the hints.
    RestoreHints {
        /// The cycle's number, whether or not it led to a changeset.
        seq: Seq,
    },
    /// What the cycle `seq` covered is on the standby.
    DropHints {
        /// The cycle's number, whether or not it led to a changeset.
        seq: Seq,
    },
    /// Answer a checkpoint.
    Confirm {
        /// The caller's number for it.
        id: u64,
        /// The changeset that holds all that was asked for.
        seq: Seq,
    },
    /// Take what is to be compared, on both sides: they stand at the same changeset. No cycle begins before
    /// [`Input::Compared`].
    Compare {
        /// The changeset.
        seq: Seq,
    },
    /// Nothing is compared.
    DontCompare {
        /// Why.
        why: Apart,
    },
}

/// Why both sides don't stand at one changeset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Apart {
    /// Everything has to be named first: nobody knows what the standby has.
    Unnamed,
    /// Changesets are under way for as long as it was waited.
    UnderWay,
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

/// LIMIT: cycles under way: one that is captured while the others travel, or are applied.
pub const IN_FLIGHT_MAX: usize = 4;

/// Before a changeset is captured anew of which the standby waits for a decision: at first soon, since what goes may come
/// again elsewhere; doubles up to [`HELD_PAUSE_MAX`]. A decision ends the link, and with it the pause.
pub const HELD_PAUSE_MIN: Duration = Duration::from_secs(4);
/// The longest that becomes.
pub const HELD_PAUSE_MAX: Duration = Duration::from_secs(60);

/// How long cycles wait for those under way to end, so that the trees can be compared: changes are later by as much.
pub const COMPARE_WAIT: Duration = Duration::from_secs(10);

/// The state machine; time is a `Duration` since any fixed moment.
#[derive(Debug)]
pub struct Follow {
    config: FollowConfig,
    link: Link,
    /// Those under way, in their order.
    cycles: VecDeque<Cycle>,
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
    /// The next pause while a decision is waited for.
    held_pause: Duration,
    /// Checkpoints that no cycle covers yet.
    asked: Vec<u64>,
    compare: Option<Compare>,
    effects: VecDeque<Effect>,
}

/// While it is there, no cycle begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compare {
    /// The cycles under way have to end first.
    Wanted {
        /// Until then.
        until: Duration,
    },
    /// What is to be compared is being taken.
    Taken,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Link {
    Down { retry_at: Duration },
    Connecting { since: Duration },
    Up,
}

#[derive(Debug)]
struct Cycle {
    seq: Seq,
    scope: Scope,
    phase: Phase,
    extent: Extent,
    /// The acknowledgement overtook the news that the capture ended.
    is_acked: bool,
    /// Checkpoints that this cycle's end confirms.
    covers: Vec<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Capturing,
    /// The link was lost or the standby refused while the capture runs: when it ends, the cycle has failed.
    Doomed,
    /// It ends with its acknowledgement, and after those before it.
    Captured(Sent),
}

impl Follow {
    /// Begins with the link down and everything to be looked at: events of the time before are lost.
    pub fn new(config: FollowConfig, now: Duration) -> Follow {
        Follow {
            link: Link::Down { retry_at: now },
            cycles: VecDeque::new(),
            pending: Some(Scope::Everything),
            baseline: Baseline::Full,
            next_seq: config.next_seq,
            last_acked: config.acked.unwrap_or_default(),
            retry_after: config.retry_min,
            full_scan_at: now + config.full_scan_every,
            pause_until: now,
            pause: config.retry_min,
            held_pause: HELD_PAUSE_MIN,
            asked: Vec::new(),
            compare: None,
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
                if let Some(cycle) = self.cycles.back_mut() {
                    cycle.extent = extent;
                }
                self.capture_ended(now, Some(sent));
            }
            Input::CaptureFailed => self.capture_ended(now, None),
            Input::Acked { seq } => self.acked(now, seq),
            Input::Refused { seq } => {
                if let Some(at) = self.cycles.iter().position(|c| c.seq == seq) {
                    self.pause(now);
                    self.abandon_from(at);
                }
            }
            Input::Held { seq } => {
                if let Some(at) = self.cycles.iter().position(|c| c.seq == seq) {
                    self.pause_until = now + self.held_pause;
                    self.held_pause = (self.held_pause * 2).min(HELD_PAUSE_MAX);
                    self.abandon_from(at);
                }
            }
            Input::Checkpoint { id } => {
                let joined = self.cycles.back_mut().filter(|_| seeded_bug!(CheckpointsJoinTheCycle));
                joined.map_or(&mut self.asked, |cycle| &mut cycle.covers).push(id);
                self.want(Scope::Hinted);
            }
            Input::Compare if self.is_up() => self.compare = Some(Compare::Wanted { until: now + COMPARE_WAIT }),
            Input::Compared => self.compare = None,
            Input::Compare | Input::Tick => {}
        }
        self.advance(now);
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When to call `handle` with [`Input::Tick`] at the latest; `None` while only an input can change anything.
    pub fn poll_timeout(&self) -> Option<Duration> {
        if let Some(Compare::Wanted { until }) = self.compare {
            return Some(until);
        }
        match self.link {
            Link::Down { retry_at } => Some(retry_at),
            Link::Connecting { .. } => None,
            Link::Up if !self.may_begin() => None,
            Link::Up if self.pending.is_some() => Some(self.pause_until),
            Link::Up if self.looks_at_everything() => None,
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
        self.is_up() && self.cycles.is_empty() && self.pending.is_none()
    }

    /// Whether the cycle that is captured, or was last, is the only one under way.
    pub fn is_alone(&self) -> bool {
        self.cycles.len() <= 1
    }

    /// Whether an answer to this changeset is awaited: it wasn't given up.
    pub fn awaits(&self, seq: Seq) -> bool {
        self.cycles.iter().any(|c| c.seq == seq && c.phase != Phase::Doomed)
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
        self.compare = None;
        self.abandon_from(0);
        self.pause_until = now; // connecting anew has a pause of its own
        // A try that waited for an answer was the pause: a link that returns is not to find nobody.
        let tried = match self.link {
            Link::Connecting { since } => now.saturating_sub(since),
            Link::Down { .. } | Link::Up => Duration::ZERO,
        };
        let pause = self.retry_after.saturating_sub(tried).max(self.config.retry_min);
        self.link = Link::Down { retry_at: now + pause };
        self.retry_after = (self.retry_after * 2).min(self.config.retry_max);
    }

    fn capture_ended(&mut self, now: Duration, sent: Option<Sent>) {
        let Some(last) = self.cycles.len().checked_sub(1) else { return };
        let cycle = &mut self.cycles[last];
        match (cycle.phase, sent) {
            (Phase::Captured(_), _) => {}
            (Phase::Doomed, _) => {
                cycle.phase = Phase::Captured(Sent::Nothing); // nothing runs any more: it can be given up
                self.abandon_from(last);
            }
            (Phase::Capturing, Some(sent)) => {
                cycle.phase = Phase::Captured(sent);
                let is_vain = sent == Sent::Nothing && cycle.extent == Extent::Part;
                self.end_cycles(now);
                if is_vain {
                    self.pause(now); // nothing came of it: the next try may as well find another moment
                }
            }
            (Phase::Capturing, None) => {
                cycle.phase = Phase::Captured(Sent::Nothing);
                self.pause(now);
                self.abandon_from(last);
            }
        }
    }

    fn acked(&mut self, now: Duration, seq: Seq) {
        // Of a cycle that was given up nothing is taken; what it covered is looked at again.
        if let Some(cycle) = self.cycles.iter_mut().find(|c| c.seq == seq && c.phase != Phase::Doomed) {
            cycle.is_acked = true;
            self.end_cycles(now);
        }
    }

    /// Ends the cycles, from the first on, that have nothing to wait for.
    fn end_cycles(&mut self, now: Duration) {
        while let Some(Cycle { seq, phase: Phase::Captured(sent), is_acked, .. }) = self.cycles.front() {
            match (*seq, *sent, *is_acked) {
                (_, Sent::Changeset, false) => return,
                (seq, Sent::Changeset, true) => {
                    self.record_acked(seq);
                    self.baseline = Baseline::Delta(seq);
                }
                (_, Sent::Nothing, _) => {}
            }
            self.end_first(now);
        }
    }

    fn record_acked(&mut self, seq: Seq) {
        self.held_pause = HELD_PAUSE_MIN;
        self.last_acked = seq;
        self.config.acked = Some(seq);
        self.next_seq = self.next_seq.max(seq.next());
        self.effects.push_back(Effect::RecordAcked { seq });
    }

    fn end_first(&mut self, now: Duration) {
        let Some(cycle) = self.cycles.pop_front() else { return };
        self.effects.push_back(Effect::DropHints { seq: cycle.seq });
        self.pause = self.config.retry_min;
        if cycle.scope == Scope::Everything {
            self.full_scan_at = now + self.config.full_scan_every;
        }
        if cycle.extent != Extent::All && !seeded_bug!(PartCountsAsAll) {
            if cycle.extent == Extent::Part {
                // What is left was hinted once more.
                self.want(Scope::Hinted);
            }
            match self.cycles.front_mut() {
                // The next one began after they were asked for as well, and may be the last that there is reason for.
                Some(next) if cycle.extent == Extent::PutOff => next.covers.extend(cycle.covers),
                _ => self.asked.extend(cycle.covers),
            }
            return;
        }
        let seq = self.last_acked;
        self.effects.extend(cycle.covers.into_iter().map(|id| Effect::Confirm { id, seq }));
    }

    /// Lets some time pass before the next cycle: what failed may well fail again.
    fn pause(&mut self, now: Duration) {
        self.pause_until = now + self.pause;
        self.pause = (self.pause * 2).min(self.config.retry_max);
    }

    /// Gives up the cycles from the one at `first` on, each at once or as soon as its capture ends.
    fn abandon_from(&mut self, first: usize) {
        for cycle in self.cycles.split_off(first) {
            match cycle.phase {
                Phase::Capturing | Phase::Doomed => self.cycles.push_back(Cycle { phase: Phase::Doomed, ..cycle }),
                Phase::Captured(_) => {
                    self.want(cycle.scope);
                    self.effects.push_back(Effect::RestoreHints { seq: cycle.seq });
                    self.asked.extend(cycle.covers);
                    // A number is never used twice: the standby may have staged some of it.
                    self.next_seq = self.next_seq.max(cycle.seq.next());
                }
            }
        }
    }

    /// Whether another cycle may begin beside those under way.
    fn may_begin(&self) -> bool {
        self.compare.is_none() && self.cycles.len() < IN_FLIGHT_MAX && self.cycles.iter().all(|c| matches!(c.phase, Phase::Captured(_)))
    }

    fn looks_at_everything(&self) -> bool {
        self.cycles.iter().any(|c| c.scope == Scope::Everything)
    }

    fn advance(&mut self, now: Duration) {
        self.advance_compare(now);
        match self.link {
            Link::Down { retry_at } if retry_at <= now => {
                self.link = Link::Connecting { since: now };
                self.effects.push_back(Effect::Connect);
            }
            Link::Up if self.may_begin() && self.pause_until <= now => {
                if self.full_scan_at <= now && !self.looks_at_everything() {
                    self.want(Scope::Everything);
                }
                if let Some(scope) = self.pending.take() {
                    self.begin(scope);
                }
            }
            _ => {}
        }
    }

    fn advance_compare(&mut self, now: Duration) {
        let Some(Compare::Wanted { until }) = self.compare else { return };
        let is_free = self.cycles.is_empty() || seeded_bug!(ComparedWhileUnderWay);
        let effect = match self.baseline {
            Baseline::Full => Effect::DontCompare { why: Apart::Unnamed },
            Baseline::Delta(seq) if is_free => Effect::Compare { seq },
            Baseline::Delta(_) if until <= now => Effect::DontCompare { why: Apart::UnderWay },
            Baseline::Delta(_) => return,
        };
        self.compare = matches!(effect, Effect::Compare { .. }).then_some(Compare::Taken);
        self.effects.push_back(effect);
    }

    fn begin(&mut self, scope: Scope) {
        let seq = self.cycles.back().map_or(self.next_seq, |last| self.next_seq.max(last.seq.next()));
        let sent = self.cycles.iter().rev().find(|c| c.phase == Phase::Captured(Sent::Changeset));
        let baseline = sent.map_or(self.baseline, |c| Baseline::Delta(c.seq));
        self.cycles.push_back(Cycle {
            seq,
            scope,
            phase: Phase::Capturing,
            extent: Extent::All,
            is_acked: false,
            covers: std::mem::take(&mut self.asked),
        });
        self.effects.push_back(Effect::Capture { seq, baseline, scope });
    }
}

#[cfg(test)]
mod tests;
