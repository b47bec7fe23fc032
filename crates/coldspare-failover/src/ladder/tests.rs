//! The ladder: single cases, every state that small limits allow, and long random runs.

use std::collections::{HashSet, VecDeque};

use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn limits() -> Limits {
    Limits {
        failures: 2,
        stop_wait: 2 * SECOND,
        kill_wait: SECOND,
        prove_every: SECOND,
        start_limit: 3 * SECOND,
        attempts: 2,
        backoff: SECOND,
        backoff_max: SECOND,
        forget_after: 4 * SECOND,
        before_failover: BeforeFailover::Fence,
    }
}

fn look(began: Duration, health: Health) -> Input {
    Input::Observed(Observation { began, health, process: Process::Unknown, disk: DiskState::Good })
}

fn failed() -> Health {
    Health::Failed("refused".into())
}

/// A ladder with a clock, and what it asked for.
struct Bench {
    ladder: Ladder,
    now: Duration,
    actions: Vec<Action>,
    news: Vec<&'static str>,
    id: u64,
}

impl Bench {
    fn new(limits: Limits) -> Bench {
        let mut bench = Bench { ladder: Ladder::new(limits, Memory::default()), now: SECOND, actions: Vec::new(), news: Vec::new(), id: 0 };
        bench.give(Input::Duty(Duty::Active));
        bench
    }

    fn give(&mut self, input: Input) {
        self.ladder.handle(self.now, input);
        while let Some(effect) = self.ladder.poll_effect() {
            match effect {
                Effect::Act { id, action } => {
                    self.id = id;
                    self.actions.push(action);
                }
                Effect::Tell(news) => self.news.push(news.word()),
                Effect::Remember(_) => {}
            }
        }
    }

    fn end(&mut self, outcome: Outcome) {
        self.give(Input::Ended { id: self.id, outcome });
    }

    fn fail(&mut self, why: &str) {
        self.end(Outcome::Failed(why.into()));
    }

    fn look(&mut self, health: Health) {
        self.give(look(self.now, health));
    }

    fn pass(&mut self, time: Duration) {
        self.now += time;
        self.give(Input::Tick);
    }

    /// Two looks that find it unhealthy.
    fn fall_ill(&mut self) {
        self.look(failed());
        self.look(failed());
    }

    #[track_caller]
    fn expect(&mut self, actions: &[Action]) {
        assert_eq!(std::mem::take(&mut self.actions), actions);
    }
}

#[test]
fn a_hung_application_is_stopped_killed_proven_dead_and_started() {
    let mut b = Bench::new(limits());
    b.look(Health::Running);
    b.look(failed());
    b.expect(&[]);
    b.look(failed());
    b.expect(&[Action::Stop]);
    b.end(Outcome::Done);
    b.expect(&[Action::Prove]);
    b.fail("java");
    b.pass(SECOND);
    b.expect(&[Action::Prove]);
    b.fail("java");
    b.expect(&[]);
    b.pass(SECOND);
    b.expect(&[Action::Prove]);
    b.fail("java");
    b.expect(&[Action::Kill]);
    b.end(Outcome::Done);
    b.expect(&[Action::Prove]);
    b.end(Outcome::Done);
    b.expect(&[Action::Start]);
    b.end(Outcome::Done);
    b.look(Health::Starting);
    b.pass(SECOND);
    b.look(Health::Running);
    assert_eq!(b.ladder.word(), "healthy");
    assert_eq!(b.news, ["correcting", "corrected"]);
    b.expect(&[]);
}

#[test]
fn two_restarts_that_fail_lead_to_one_failover() {
    let mut b = Bench::new(limits());
    for _ in 0..2 {
        b.fall_ill();
        b.expect(&[Action::Stop]);
        b.end(Outcome::Done);
        b.end(Outcome::Done);
        b.expect(&[Action::Prove, Action::Start]);
        b.end(Outcome::Done);
        b.look(failed());
        b.pass(3 * SECOND);
        b.pass(SECOND);
    }
    b.expect(&[Action::Stop]);
    b.end(Outcome::Done);
    b.end(Outcome::Done);
    b.expect(&[Action::Prove, Action::Failover { proven_dead: true }]);
    b.fail("no");
    for _ in 0..50 {
        b.look(failed());
        b.pass(SECOND);
    }
    b.expect(&[]);
    assert_eq!(b.news.iter().filter(|n| **n == "escalated").count(), 1);
    assert!(b.ladder.memory().escalated);
    let mut again = Bench::new(limits());
    again.ladder = Ladder::new(limits(), b.ladder.memory());
    again.give(Input::Duty(Duty::Active));
    again.fall_ill();
    again.expect(&[]);
}

#[test]
fn without_proof_of_death_nothing_starts_and_the_fence_decides() {
    for (fence, expected) in [(Outcome::Done, vec![Action::Failover { proven_dead: false }]), (Outcome::Failed("none".into()), vec![])] {
        let mut b = Bench::new(limits());
        b.fall_ill();
        let mut guard = 0;
        while b.actions.last() != Some(&Action::FenceSelf) {
            match b.actions.last() {
                Some(Action::Prove) => b.fail("git, pid 7"),
                Some(_) => b.end(Outcome::Done),
                None => b.fall_ill(),
            }
            assert!(!b.actions.contains(&Action::Start));
            b.pass(SECOND);
            b.look(failed());
            guard += 1;
            assert!(guard < 200);
        }
        b.actions.clear();
        b.end(fence.clone());
        b.expect(&expected);
        assert_eq!(b.news.contains(&"withheld"), fence != Outcome::Done);
    }
}

#[test]
fn a_start_without_hope_is_given_up_before_its_limit() {
    for (health, process, disk) in
        [(failed(), Process::Gone, DiskState::Good), (Health::Running, Process::Unknown, DiskState::Failed("EIO".into()))]
    {
        let mut b = Bench::new(limits());
        b.fall_ill();
        (0..3).for_each(|_| b.end(Outcome::Done));
        for _ in 0..2 {
            assert_eq!(b.ladder.memory().attempts, 0);
            let look = Observation { began: b.now, health: health.clone(), process, disk: disk.clone() };
            b.give(Input::Observed(look));
        }
        assert_eq!(b.ladder.memory().attempts, 1);
    }
}

#[test]
fn a_start_command_that_takes_its_time_has_not_failed() {
    let gone = |b: &mut Bench| {
        let look = Observation { began: b.now, health: failed(), process: Process::Gone, disk: DiskState::Good };
        b.give(Input::Observed(look));
    };
    let mut b = Bench::new(limits());
    b.fall_ill();
    (0..2).for_each(|_| b.end(Outcome::Done));
    for _ in 0..2 {
        gone(&mut b);
        b.pass(SECOND);
    }
    b.end(Outcome::Done);
    assert_eq!(b.ladder.memory().attempts, 0);
    gone(&mut b);
    assert_eq!(b.ladder.memory().attempts, 0);
    b.look(Health::Running);
    assert_eq!(b.ladder.word(), "healthy");
}

#[test]
fn starting_is_told_of_and_left_alone_however_long_it_takes() {
    let mut b = Bench::new(limits());
    b.fall_ill();
    b.end(Outcome::Done);
    b.end(Outcome::Done);
    b.end(Outcome::Done);
    b.actions.clear();
    for _ in 0..30 {
        b.pass(SECOND);
        b.look(Health::Starting);
    }
    b.expect(&[]);
    assert_eq!(b.news, ["correcting", "start-slow"]);
    b.look(Health::Running);
    assert_eq!(b.news.last(), Some(&"corrected"));
}

#[test]
fn maintenance_in_the_midst_of_a_correction_ends_it() {
    let mut b = Bench::new(limits());
    b.fall_ill();
    b.expect(&[Action::Stop]);
    b.look(Health::Maintenance);
    b.end(Outcome::Done);
    b.pass(10 * SECOND);
    b.expect(&[]);
    assert_eq!(b.news.last(), Some(&"left-alone"));
}

#[test]
fn a_look_from_before_the_start_doesnt_count_as_health() {
    let mut b = Bench::new(limits());
    b.fall_ill();
    b.end(Outcome::Done);
    let before = b.now;
    b.pass(SECOND);
    b.end(Outcome::Done);
    b.end(Outcome::Done);
    b.give(look(before, Health::Running));
    assert_eq!(b.ladder.word(), "correcting");
    b.look(Health::Running);
    assert_eq!(b.ladder.word(), "healthy");
}

#[test]
fn health_that_lasts_lets_attempts_be_forgotten_and_health_that_doesnt_wont() {
    let mut b = Bench::new(limits());
    let restart = |b: &mut Bench| {
        b.fall_ill();
        b.end(Outcome::Done);
        b.end(Outcome::Done);
        b.fail("exit 1");
        b.pass(SECOND);
    };
    restart(&mut b);
    assert_eq!(b.ladder.memory().attempts, 1);
    b.look(Health::Running);
    b.pass(3 * SECOND);
    assert_eq!(b.ladder.memory().attempts, 1);
    b.pass(SECOND);
    assert_eq!(b.ladder.memory().attempts, 0);
    restart(&mut b);
    restart(&mut b);
    assert_eq!(b.actions.last(), Some(&Action::Stop));
    b.end(Outcome::Done);
    b.end(Outcome::Done);
    assert_eq!(b.actions.last(), Some(&Action::Failover { proven_dead: true }));
}

/// What the ladder promises, as somebody watches who knows nothing of its inside.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
struct Witness {
    duty: Option<Duty>,
    hands_off: bool,
    /// The last action that changed the application's fate, and whether death was proven since.
    is_dead: bool,
    stop_age: Option<Duration>,
    /// Attempts whose end was seen: a start that was issued, or a kill whose proof failed.
    tries: u32,
    failovers: u32,
    busy: Option<(u64, Action)>,
    is_fenced: bool,
    /// When the application was started last.
    started_at: Duration,
}

impl Witness {
    fn input(&mut self, input: &Input) {
        match input {
            Input::Duty(duty) => {
                let is_anew = self.duty == Some(Duty::Paused) && *duty != Duty::Paused || *duty == Duty::Inactive;
                if is_anew && self.duty != Some(*duty) {
                    (self.tries, self.failovers) = (0, 0);
                }
                if self.duty != Some(*duty) {
                    self.hands_off = false;
                }
                self.duty = Some(*duty);
            }
            Input::Observed(o) => {
                // What was seen before the last start is of another run of the application.
                if o.began >= self.started_at {
                    self.hands_off = !matches!(o.health, Health::Running | Health::Failed(_)) && self.duty == Some(Duty::Active);
                }
            }
            Input::Ended { id, outcome } => {
                if let Some((_, action)) = self.busy.take_if(|(busy, _)| busy == id) {
                    match (action, outcome) {
                        (Action::Prove, Outcome::Done) => self.is_dead = true,
                        (Action::FenceSelf, Outcome::Done) => self.is_fenced = true,
                        _ => {}
                    }
                }
            }
            Input::Tick => {}
        }
    }

    fn effect(&mut self, now: Duration, effect: &Effect, limits: &Limits) {
        let Effect::Act { id, action } = effect else {
            match effect {
                Effect::Tell(News::Forgotten) => (self.tries, self.failovers) = (0, 0),
                Effect::Tell(News::AttemptFailed { .. }) => self.tries += 1,
                _ => {}
            }
            return;
        };
        assert_eq!(self.busy, None, "one action at a time");
        assert_eq!(self.duty, Some(Duty::Active), "nothing is done by who isn't active, or is paused: {action:?}");
        if !matches!(action, Action::Prove) {
            assert!(!self.hands_off, "hands off, and yet {action:?}");
        }
        match action {
            Action::Stop => {
                (self.stop_age, self.is_dead, self.is_fenced) = (Some(Duration::ZERO), false, false);
            }
            Action::Kill => assert!(self.stop_age.is_some_and(|age| age >= limits.stop_wait), "killed before its time to stop was over"),
            Action::Prove => self.is_dead = false,
            Action::Start => {
                assert!(self.is_dead, "started without proof of death");
                (self.is_dead, self.hands_off, self.started_at) = (false, false, now);
            }
            Action::FenceSelf => assert!(self.tries >= limits.attempts),
            Action::Failover { proven_dead } => {
                assert!(self.tries >= limits.attempts, "handed over after {} attempts", self.tries);
                assert_eq!(*proven_dead, self.is_dead);
                assert!(self.is_dead || self.is_fenced, "handed over, neither dead nor fenced");
                self.failovers += 1;
                assert_eq!(self.failovers, 1, "handed over twice");
            }
        }
        self.busy = Some((*id, *action));
    }
}

/// A ladder and its witness as a state of the exploration.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    ladder: Ladder,
    witness: Witness,
}

impl State {
    fn take(&mut self, now: Duration, input: Input) {
        self.witness.input(&input);
        self.ladder.handle(now, input);
        let limits = self.ladder.limits;
        while let Some(effect) = self.ladder.poll_effect() {
            self.witness.effect(now, &effect, &limits);
        }
    }

    /// Lets time pass: all that is told by the clock is told by how far it is off, so that states repeat.
    fn pass(&mut self, by: Duration) {
        let l = &mut self.ladder;
        let less = |at: &mut Duration| *at = at.saturating_sub(by);
        less(&mut l.not_before);
        less(&mut l.looks_from);
        match &mut l.phase {
            Phase::Dying { until, prove_at, .. } => {
                less(until);
                less(prove_at);
            }
            Phase::Rising { give_up_at } => less(give_up_at),
            _ => {}
        }
        let cap = 2 * SECOND;
        less(&mut self.witness.started_at);
        if let Some(age) = &mut self.witness.stop_age {
            *age = (*age + by).min(cap);
        }
        // Since when something is so lies before now: now moves instead, by a base that all runs share.
        for since in [&mut l.healthy_since, &mut l.young_since].into_iter().flatten() {
            *since = since.saturating_sub(by);
        }
    }

    fn settle(&mut self) {
        // What is long past is all the same.
        for at in [&mut self.ladder.not_before, &mut self.ladder.looks_from, &mut self.witness.started_at] {
            *at = (*at).max(NOW - 2 * SECOND);
        }
        for since in [&mut self.ladder.healthy_since, &mut self.ladder.young_since].into_iter().flatten() {
            *since = (*since).max(NOW - 3 * SECOND);
        }
        match &mut self.ladder.phase {
            Phase::Dying { until, prove_at, .. } => (*until, *prove_at) = ((*until).max(NOW), (*prove_at).max(NOW)),
            Phase::Rising { give_up_at } => *give_up_at = (*give_up_at).max(NOW),
            _ => {}
        }
        let rename = |id: u64| u64::from(id != 0);
        self.ladder.next_id = 2;
        if let Some((id, _)) = &mut self.ladder.busy {
            *id = rename(*id);
        }
        if let Some((id, _)) = &mut self.witness.busy {
            *id = rename(*id);
        }
        self.witness.tries = self.witness.tries.min(self.ladder.limits.attempts + 1);
    }
}

/// The clock at which every state of the exploration stands: far enough from zero for all that lies before.
const NOW: Duration = Duration::from_secs(20);

fn inputs(state: &State) -> Vec<Input> {
    let young = Process::Alive { incarnation: 1, age: SECOND };
    let old = Process::Alive { incarnation: 1, age: 9 * SECOND };
    let look = |began, health, process| Input::Observed(Observation { began, health, process, disk: DiskState::Good });
    let mut all = vec![
        Input::Tick,
        look(NOW, Health::Running, old),
        look(NOW, failed(), Process::Gone),
        look(NOW, failed(), old),
        look(NOW, failed(), young),
        look(NOW, Health::Maintenance, old),
        look(NOW, Health::Starting, young),
        look(NOW - SECOND, Health::Running, old),
        Input::Duty(Duty::Active),
        Input::Duty(Duty::Inactive),
        Input::Duty(Duty::Paused),
    ];
    if let Some((id, _)) = state.ladder.busy {
        all.push(Input::Ended { id, outcome: Outcome::Done });
        all.push(Input::Ended { id, outcome: Outcome::Failed("x".into()) });
        all.push(Input::Ended { id: 0, outcome: Outcome::Done });
    }
    all
}

/// Every state that `limits` allow, by every order of inputs; the witness asserts.
fn explore(limits: Limits) -> (usize, HashSet<&'static str>) {
    let first = State { ladder: Ladder::new(limits, Memory::default()), witness: Witness::default() };
    let mut seen = HashSet::from([first.clone()]);
    let mut queue = VecDeque::from([first]);
    let mut met = HashSet::new();
    while let Some(state) = queue.pop_front() {
        for input in inputs(&state) {
            for elapsed in [Duration::ZERO, SECOND] {
                let mut next = state.clone();
                next.pass(elapsed);
                next.take(NOW, input.clone());
                next.settle();
                met.insert(match next.witness.busy {
                    Some((_, Action::Start)) => "start",
                    Some((_, Action::Kill)) => "kill",
                    Some((_, Action::FenceSelf)) => "fence",
                    Some((_, Action::Failover { proven_dead: true })) => "failover of a dead one",
                    Some((_, Action::Failover { proven_dead: false })) => "failover of a fenced one",
                    _ => "else",
                });
                if seen.insert(next.clone()) {
                    queue.push_back(next);
                }
            }
        }
    }
    (seen.len(), met)
}

#[test]
fn no_order_of_inputs_breaks_a_promise() {
    let small = Limits { failures: 1, stop_wait: SECOND, start_limit: 2 * SECOND, forget_after: 2 * SECOND, attempts: 2, ..limits() };
    let (states, met) = explore(small);
    println!("{states} states of the ladder");
    assert!(states > 2_000);
    assert_eq!(met.len(), 6, "{met:?}");
}

fn any_input() -> impl Strategy<Value = (u64, u8, bool)> {
    (0u64..1500, 0u8..14, any::<bool>())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    /// As the exploration, with the default shape of limits, real elapsed times, and outcomes that come late or never.
    #[test]
    fn no_long_run_breaks_a_promise(steps in proptest::collection::vec(any_input(), 0..300)) {
        let mut state = State { ladder: Ladder::new(limits(), Memory::default()), witness: Witness::default() };
        let mut now = Duration::ZERO;
        state.take(now, Input::Duty(Duty::Active));
        for (elapsed, which, is_stale) in steps {
            let elapsed = Duration::from_millis(elapsed);
            now += elapsed;
            if let Some(age) = &mut state.witness.stop_age {
                *age += elapsed;
            }
            let began = if is_stale { now.saturating_sub(SECOND) } else { now };
            let busy = state.ladder.busy.map_or(0, |(id, _)| id);
            state.take(now, match which {
                0 | 1 => look(began, Health::Running),
                2..=5 => look(began, failed()),
                6 => look(began, Health::Maintenance),
                7 => look(began, Health::Starting),
                8 if is_stale => Input::Duty(Duty::Paused),
                8 | 9 => Input::Duty(Duty::Active),
                10 | 11 => Input::Ended { id: busy, outcome: Outcome::Done },
                12 => Input::Ended { id: busy, outcome: Outcome::Failed("x".into()) },
                _ => Input::Tick,
            });
        }
    }

    /// While it stays unhealthy and every action is answered, the ladder ends in a failover, whatever comes of the actions.
    #[test]
    fn what_stays_unhealthy_is_escalated(outcomes in proptest::collection::vec(any::<bool>(), 64)) {
        let mut b = Bench::new(Limits { before_failover: BeforeFailover::CommandFences, ..limits() });
        for n in 0..400 {
            b.look(failed());
            if b.ladder.busy.is_some() {
                let is_good = outcomes[n % outcomes.len()];
                b.end(if is_good { Outcome::Done } else { Outcome::Failed("x".into()) });
            }
            b.pass(SECOND);
        }
        let failovers = b.actions.iter().filter(|a| matches!(a, Action::Failover { .. })).count();
        prop_assert_eq!(failovers, 1);
    }
}
