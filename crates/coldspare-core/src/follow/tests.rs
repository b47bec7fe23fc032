use std::collections::{BTreeMap, BTreeSet};

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

#[test]
fn a_try_that_waited_is_no_reason_to_wait() {
    let (ms, mut f) = (Duration::from_millis, follow(8, Some(7)));
    let mut now = T0;
    let mut pauses = |takes: Duration| -> Vec<Duration> {
        let pauses = (0..7).map(|_| {
            f.handle(now, Input::Tick);
            assert_eq!(effects(&mut f), [Effect::Connect]);
            now += takes;
            f.handle(now, Input::Lost);
            let pause = f.poll_timeout().expect("it is tried again") - now;
            now += pause;
            pause
        });
        pauses.collect()
    };
    assert_eq!(pauses(T0), [200, 400, 800, 1600, 3200, 5000, 5000].map(ms));
    assert_eq!(pauses(ms(10_000)), [200; 7].map(ms));
    assert_eq!(pauses(ms(4_000))[0], ms(1_000));
}

#[test]
fn trees_are_compared_between_changesets_and_cycles_wait_for_that() {
    let mut f = idle();
    f.handle(T0, Input::Hints);
    let capture = |seq, from| Effect::Capture { seq: Seq(seq), baseline: Baseline::Delta(Seq(from)), scope: Scope::Hinted };
    assert_eq!(effects(&mut f), [capture(8, 7)]);
    f.handle(T0, Input::Compare);
    f.handle(T0, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
    f.handle(T0, Input::Hints);
    assert_eq!((effects(&mut f), f.poll_timeout()), (vec![], Some(COMPARE_WAIT)));
    f.handle(T0, Input::Acked { seq: Seq(8) });
    let ended = [Effect::RecordAcked { seq: Seq(8) }, Effect::DropHints { seq: Seq(8) }];
    assert_eq!(effects(&mut f), [ended.to_vec(), vec![Effect::Compare { seq: Seq(8) }]].concat());
    f.handle(T0, Input::Tick);
    assert_eq!(effects(&mut f), []);
    f.handle(T0, Input::Compared);
    assert_eq!(effects(&mut f), [capture(9, 8)]);
    // Not for ever: changes go before.
    f.handle(T0, Input::Compare);
    f.handle(T0, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
    f.handle(T0, Input::Hints);
    f.handle(COMPARE_WAIT, Input::Tick);
    assert_eq!(effects(&mut f), [Effect::DontCompare { why: Apart::UnderWay }, capture(10, 9)]);
}

#[test]
fn nothing_is_compared_before_everything_was_named() {
    let mut f = follow(8, Some(7));
    f.handle(T0, Input::Compare);
    f.handle(T0, Input::Tick);
    f.handle(T0, Input::Opened { applied: None });
    effects(&mut f);
    f.handle(T0, Input::Compare);
    assert_eq!(effects(&mut f), [Effect::DontCompare { why: Apart::Unnamed }]);
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
    assert_eq!(effects(&mut f), [Effect::Capture { seq: Seq(9), baseline: Baseline::Delta(Seq(8)), scope: Scope::Hinted }]);
    f.handle(T0, Input::Captured { sent: Sent::Nothing, extent: Extent::All });
    assert_eq!(effects(&mut f), [], "the changeset before it may hold what was asked for");
    f.handle(T0, Input::Acked { seq: Seq(8) });
    let ended = |seq| Effect::DropHints { seq: Seq(seq) };
    assert_eq!(effects(&mut f), [Effect::RecordAcked { seq: Seq(8) }, ended(8), ended(9), Effect::Confirm { id: 1, seq: Seq(8) }]);
}

#[test]
fn an_acknowledgement_may_overtake_the_end_of_the_capture() {
    let mut f = idle();
    f.handle(T0, Input::Checkpoint { id: 1 });
    let [.., Effect::Capture { seq, .. }] = effects(&mut f)[..] else { panic!("no capture") };
    f.handle(T0, Input::Acked { seq });
    assert_eq!(effects(&mut f), []);
    f.handle(T0, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
    assert_eq!(effects(&mut f), [Effect::RecordAcked { seq }, Effect::DropHints { seq }, Effect::Confirm { id: 1, seq }]);
}

#[test]
fn what_waits_for_a_decision_is_tried_again_ever_later_and_at_once_after_one() {
    let mut f = idle();
    let mut now = T0;
    f.handle(now, Input::Hints);
    for pause in [4, 8, 16, 32, 60, 60] {
        let found = effects(&mut f);
        let Some(Effect::Capture { seq, .. }) = found.last() else { panic!("{found:?}") };
        let seq = *seq;
        f.handle(now, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
        f.handle(now, Input::Held { seq });
        assert_eq!(effects(&mut f), [Effect::RestoreHints { seq }]);
        assert_eq!(f.poll_timeout(), Some(now + Duration::from_secs(pause)));
        now += Duration::from_secs(pause);
        f.handle(now, Input::Tick);
    }
    let found = effects(&mut f);
    let Some(Effect::Capture { seq, .. }) = found.last() else { panic!("{found:?}") };
    f.handle(now, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
    f.handle(now, Input::Held { seq: *seq });
    // Somebody decided: the link ends.
    f.handle(now, Input::Lost);
    let at = f.poll_timeout().expect("it connects again");
    assert_eq!(at, now + Duration::from_millis(200));
    f.handle(at, Input::Tick);
    f.handle(at, Input::Opened { applied: applied(7) });
    assert!(matches!(effects(&mut f).last(), Some(Effect::Capture { .. })));
}

#[test]
fn some_cycles_are_under_way_and_end_in_their_order() {
    let mut f = idle();
    let capture = |seq: u64| Effect::Capture { seq: Seq(seq), baseline: Baseline::Delta(Seq(seq - 1)), scope: Scope::Hinted };
    for seq in 8..12 {
        f.handle(T0, Input::Hints);
        assert_eq!(effects(&mut f), [capture(seq)]);
        f.handle(T0, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
    }
    f.handle(T0, Input::Hints);
    assert_eq!((effects(&mut f), f.poll_timeout()), (vec![], None), "as many as there may be");
    f.handle(T0, Input::Acked { seq: Seq(8) });
    assert_eq!(effects(&mut f), [Effect::RecordAcked { seq: Seq(8) }, Effect::DropHints { seq: Seq(8) }, capture(12)]);
    // One that fails takes those behind it along.
    f.handle(T0, Input::Refused { seq: Seq(10) });
    let restore = |seq| Effect::RestoreHints { seq: Seq(seq) };
    assert_eq!(effects(&mut f), [restore(10), restore(11)]);
    f.handle(T0, Input::Refused { seq: Seq(11) });
    f.handle(T0, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
    f.handle(T0, Input::Acked { seq: Seq(9) });
    assert_eq!(effects(&mut f), [restore(12), Effect::RecordAcked { seq: Seq(9) }, Effect::DropHints { seq: Seq(9) }]);
    let at = f.poll_timeout().unwrap();
    f.handle(at, Input::Tick);
    assert_eq!(effects(&mut f), [Effect::Capture { seq: Seq(13), baseline: Baseline::Delta(Seq(9)), scope: Scope::Hinted }]);
}

#[test]
fn a_checkpoint_waits_for_what_a_cycle_left_to_the_next() {
    let mut f = idle();
    f.handle(T0, Input::Checkpoint { id: 1 });
    f.handle(T0, Input::Captured { sent: Sent::Changeset, extent: Extent::Part });
    f.handle(T0, Input::Acked { seq: Seq(8) });
    let capture = |seq, from| Effect::Capture { seq: Seq(seq), baseline: Baseline::Delta(Seq(from)), scope: Scope::Hinted };
    let ended = |seq| Effect::DropHints { seq: Seq(seq) };
    assert_eq!(effects(&mut f), [capture(8, 7), Effect::RecordAcked { seq: Seq(8) }, ended(8), capture(9, 8)]);
    f.handle(T0, Input::Captured { sent: Sent::Nothing, extent: Extent::Part });
    assert_eq!(effects(&mut f), [ended(9)], "a moment passes when nothing came of a try");
    let at = f.poll_timeout().unwrap();
    f.handle(at, Input::Tick);
    f.handle(at, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
    f.handle(at, Input::Acked { seq: Seq(9) });
    let confirmed = Effect::Confirm { id: 1, seq: Seq(9) };
    assert_eq!(effects(&mut f), [capture(9, 8), Effect::RecordAcked { seq: Seq(9) }, ended(9), confirmed]);
}

#[test]
fn a_checkpoint_waits_for_what_is_put_off_and_no_cycle_runs_in_vain() {
    let mut f = idle();
    f.handle(T0, Input::Checkpoint { id: 1 });
    f.handle(T0, Input::Captured { sent: Sent::Nothing, extent: Extent::PutOff });
    let capture = |seq| Effect::Capture { seq: Seq(seq), baseline: Baseline::Delta(Seq(7)), scope: Scope::Hinted };
    assert_eq!(effects(&mut f), [capture(8), Effect::DropHints { seq: Seq(8) }]);
    f.handle(T0 + Duration::from_secs(1), Input::Tick);
    assert_eq!(effects(&mut f), [], "there is nothing to do for it");
    // A push meanwhile: what was put off isn't in its changeset.
    f.handle(T0, Input::Hints);
    f.handle(T0, Input::Captured { sent: Sent::Changeset, extent: Extent::PutOff });
    f.handle(T0, Input::Acked { seq: Seq(8) });
    let ended = |seq| [Effect::RecordAcked { seq: Seq(seq) }, Effect::DropHints { seq: Seq(seq) }];
    assert_eq!(effects(&mut f), [vec![capture(8)], ended(8).into()].concat());
    f.handle(T0, Input::Hints);
    f.handle(T0, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
    f.handle(T0, Input::Acked { seq: Seq(9) });
    let capture = Effect::Capture { seq: Seq(9), baseline: Baseline::Delta(Seq(8)), scope: Scope::Hinted };
    assert_eq!(effects(&mut f), [vec![capture], ended(9).into(), vec![Effect::Confirm { id: 1, seq: Seq(9) }]].concat());
}

#[test]
fn what_was_put_off_is_confirmed_by_a_cycle_that_was_under_way_already() {
    let mut f = idle();
    f.handle(T0, Input::Checkpoint { id: 1 });
    f.handle(T0, Input::Captured { sent: Sent::Changeset, extent: Extent::PutOff });
    // Its content is there before the first changeset is acknowledged.
    f.handle(T0, Input::Hints);
    f.handle(T0, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
    effects(&mut f);
    f.handle(T0, Input::Acked { seq: Seq(8) });
    assert_eq!(effects(&mut f), [Effect::RecordAcked { seq: Seq(8) }, Effect::DropHints { seq: Seq(8) }]);
    f.handle(T0, Input::Acked { seq: Seq(9) });
    let ended = [Effect::RecordAcked { seq: Seq(9) }, Effect::DropHints { seq: Seq(9) }, Effect::Confirm { id: 1, seq: Seq(9) }];
    assert_eq!(effects(&mut f), ended);
}

#[test]
fn a_lost_link_loses_no_hint_and_no_checkpoint() {
    let mut f = idle();
    f.handle(T0, Input::Checkpoint { id: 5 });
    effects(&mut f);
    f.handle(T0, Input::Captured { sent: Sent::Changeset, extent: Extent::All });
    f.handle(T0, Input::Lost);
    assert_eq!(effects(&mut f), [Effect::RestoreHints { seq: Seq(8) }]);
    f.handle(T0, Input::Acked { seq: Seq(8) }); // too late: ignored
    assert_eq!(effects(&mut f), []);
    let at = f.poll_timeout().unwrap();
    f.handle(at, Input::Tick);
    assert_eq!(effects(&mut f), [Effect::Connect]);
    f.handle(at, Input::Opened { applied: applied(8) });
    let again = Effect::Capture { seq: Seq(9), baseline: Baseline::Delta(Seq(8)), scope: Scope::Hinted };
    assert_eq!(effects(&mut f), [Effect::RecordAcked { seq: Seq(8) }, again]);
    f.handle(at, Input::Captured { sent: Sent::Nothing, extent: Extent::All });
    assert_eq!(effects(&mut f), [Effect::DropHints { seq: Seq(9) }, Effect::Confirm { id: 5, seq: Seq(8) }]);
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
    assert_eq!(effects(&mut f), [Effect::RestoreHints { seq: Seq(8) }, again]);
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
    assert_eq!(effects(&mut f), [Effect::RestoreHints { seq: Seq(8) }]);
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
        for step in 0..400 {
            world.step(step >= 120);
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
    /// Those that wait until their content was sent as bulk.
    put_off: Vec<usize>,
    /// The capture that runs, with the hints that it took, which are handed over when it ends.
    running: Option<Flight>,
    /// Those of captures that ended.
    taken: BTreeMap<Seq, Vec<usize>>,
    /// Changesets on their way to the standby.
    flying: VecDeque<Flight>,
    on_standby: BTreeSet<usize>,
    applied: Option<Applied>,
    asked: u64,
    asked_at: Vec<usize>,
    confirmed: Vec<u64>,
    /// What is compared is being taken.
    is_comparing: bool,
    compared: u64,
}

#[derive(Clone)]
struct Flight {
    seq: Seq,
    baseline: Baseline,
    hints: Vec<usize>,
    /// Whether anything was put off when the capture began, once it looked; the hints it takes after that.
    was_put_off: Option<bool>,
    has_taken: bool,
}

impl World {
    fn new(seed: u64) -> World {
        World {
            random: seed,
            machine: follow(1, None),
            now: T0,
            hinted: 0,
            dirty: Vec::new(),
            put_off: Vec::new(),
            running: None,
            taken: BTreeMap::new(),
            flying: VecDeque::new(),
            on_standby: BTreeSet::new(),
            applied: None,
            asked: 0,
            asked_at: Vec::new(),
            confirmed: Vec::new(),
            is_comparing: false,
            compared: 0,
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
                Effect::Capture { seq, baseline, .. } => {
                    assert!(self.running.is_none(), "two captures at once");
                    assert!(!self.is_comparing, "a capture while both sides have to stand still");
                    self.running = Some(Flight { seq, baseline, hints: Vec::new(), was_put_off: None, has_taken: false });
                }
                Effect::RestoreHints { seq } => self.dirty.append(&mut self.taken.remove(&seq).unwrap()),
                Effect::DropHints { seq } => {
                    let mut hints = self.taken.remove(&seq).unwrap().into_iter();
                    assert!(hints.all(|hint| self.on_standby.contains(&hint)), "hints were dropped too early");
                }
                Effect::Confirm { id, .. } => {
                    let asked_at = self.asked_at[usize::try_from(id).unwrap()];
                    assert!((0..asked_at).all(|hint| self.on_standby.contains(&hint)), "confirmed too early");
                    self.confirmed.push(id);
                }
                Effect::RecordAcked { .. } | Effect::DontCompare { .. } => {}
                Effect::Compare { seq } => {
                    assert_eq!(self.applied.map(|a| a.seq), Some(seq));
                    // What was given up may still arrive; it follows on what was refused.
                    let is_given_up = |f: &Flight| f.baseline != Baseline::Full && f.baseline != Baseline::Delta(seq);
                    assert!(self.running.is_none() && self.flying.iter().all(is_given_up), "compared while something is under way");
                    self.is_comparing = true;
                    self.compared += 1;
                }
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
        if !calm && self.chance(12) {
            // Changesets may have been applied although nobody hears of it.
            while self.chance(2) && self.apply().is_some() {}
            self.flying.clear();
            self.is_comparing = false;
            self.input(Input::Lost);
        }
        if !self.put_off.is_empty() && self.chance(4) {
            self.dirty.append(&mut self.put_off);
            self.input(Input::Hints);
        }
        if std::mem::take(&mut self.is_comparing) {
            self.input(Input::Compared);
        } else if !calm && self.chance(8) {
            self.input(Input::Compare);
        }
        if self.running.is_some() && self.chance(2) {
            self.go_on_with_capture(calm);
        } else if !self.flying.is_empty() && self.chance(3) {
            if calm || !self.chance(5) {
                let input = self.apply().unwrap();
                self.input(input);
            } else if let Some(Flight { seq, .. }) = self.flying.pop_front() {
                self.input(Input::Refused { seq });
            }
        }
    }

    /// The standby takes the next changeset, if it follows the last.
    fn apply(&mut self) -> Option<Input> {
        let Flight { seq, baseline, hints, .. } = self.flying.pop_front()?;
        let follows = baseline == Baseline::Full || self.applied.is_some_and(|a| baseline == Baseline::Delta(a.seq));
        if !follows {
            return Some(Input::Refused { seq });
        }
        self.on_standby.extend(hints);
        self.applied = Some(Applied { session: MINE, seq, as_of_ms: 0 });
        Some(Input::Acked { seq })
    }

    fn go_on_with_capture(&mut self, calm: bool) {
        match &mut self.running {
            Some(flight) if flight.was_put_off.is_none() => flight.was_put_off = Some(!self.put_off.is_empty()),
            Some(flight) if !flight.has_taken => {
                flight.has_taken = true;
                flight.hints = std::mem::take(&mut self.dirty);
            }
            _ => self.end_capture(calm),
        }
    }

    fn end_capture(&mut self, calm: bool) {
        let Some(mut flight) = self.running.take() else { return };
        let mut was_put_off = flight.was_put_off == Some(true);
        if !flight.hints.is_empty() && self.chance(if calm { 6 } else { 3 }) {
            self.put_off.extend(flight.hints.pop());
            was_put_off = true;
        }
        self.taken.insert(flight.seq, flight.hints.clone());
        if !calm && self.chance(4) {
            return self.input(Input::CaptureFailed);
        }
        let will_have = |hint: &usize| self.on_standby.contains(hint) || self.flying.iter().any(|f| f.hints.contains(hint));
        let sent = if flight.hints.iter().all(will_have) { Sent::Nothing } else { Sent::Changeset };
        // What the machine has given up meanwhile went to a link that is gone.
        let is_awaited = self.machine.cycles.back().is_some_and(|c| c.phase == Phase::Capturing);
        if sent == Sent::Changeset && is_awaited {
            self.flying.push_back(flight);
        }
        self.input(Input::Captured { sent, extent: Extent::of(false, was_put_off, !self.put_off.is_empty()) });
        if !self.dirty.is_empty() {
            self.input(Input::Hints); // those that came meanwhile woke nobody
        }
    }
}
