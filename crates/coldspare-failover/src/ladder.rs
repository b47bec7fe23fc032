//! The correction ladder: when the application is stopped, killed, started, and when another host has to take over.
//!
//! Decides; performs nothing. Inputs come through [`Ladder::handle`], what is to be done comes out of
//! [`Ladder::poll_effect`] until it is `None`, and [`Ladder::poll_timeout`] says when to call `handle` with
//! [`Input::Tick`] at the latest. Each [`Effect::Act`] is answered by [`Input::Ended`] with its id, whatever came of it.
//!
//! It must not know processes, sockets, files or the wall clock: `now` comes from a clock that never jumps.
//!
//! Invariants:
//! - the application is started only right after it was proven dead;
//! - it is killed only after it was asked to stop, and had all of its time;
//! - the failover command runs once, after all attempts at least, and not before the application is proven dead, or this
//!   host is fenced, or the command is known to fence it;
//! - nothing is done while the last look says hands off, while this host isn't the active, or while guarding is paused;
//! - one action at a time.

mod event;

use std::collections::VecDeque;
use std::time::Duration;

use crate::observation::{DiskState, HandsOff, Health, Observation, Process, Verdict, Youth};
pub use event::{Action, BeforeFailover, Duty, Effect, Input, Limits, Memory, News, Outcome};

/// Where the ladder stands.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Ladder {
    limits: Limits,
    duty: Duty,
    phase: Phase,
    memory: Memory,
    /// What the last look meant; `None` before the first one of a phase.
    verdict: Option<Verdict>,
    /// Looks in a row that found it unhealthy.
    failures: u32,
    /// Looks in a row that found what waiting doesn't mend: neither process nor answer, or a disk that takes no writes.
    hopeless: u32,
    /// The process that was last seen to serve.
    ran: Option<u64>,
    young_since: Option<Duration>,
    healthy_since: Option<Duration>,
    /// The next attempt doesn't begin earlier.
    not_before: Duration,
    /// Looks that began earlier tell of the time before the last start.
    looks_from: Duration,
    busy: Option<(u64, Action)>,
    next_id: u64,
    told: Option<News>,
    is_scarce: bool,
    effects: VecDeque<Effect>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Phase {
    Watching,
    Stop(Goal),
    /// It was asked to stop, or killed: proven dead it has to be until then.
    Dying {
        goal: Goal,
        until: Duration,
        prove_at: Duration,
        means: Means,
    },
    Kill(Goal),
    Start,
    /// It was started.
    Rising {
        give_up_at: Duration,
    },
    Fence,
    Failover {
        proven_dead: bool,
    },
    Escalated,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Goal {
    Restart,
    HandOver,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Means {
    Asked,
    Killed,
}

impl Ladder {
    /// Begins with nothing known but `memory`, which is what the last [`Effect::Remember`] said.
    pub fn new(limits: Limits, memory: Memory) -> Ladder {
        Ladder {
            limits,
            duty: Duty::Inactive,
            phase: if memory.escalated { Phase::Escalated } else { Phase::Watching },
            memory,
            verdict: None,
            failures: 0,
            hopeless: 0,
            ran: None,
            young_since: None,
            healthy_since: None,
            not_before: Duration::ZERO,
            looks_from: Duration::ZERO,
            busy: None,
            next_id: 1,
            told: None,
            is_scarce: false,
            effects: VecDeque::new(),
        }
    }

    /// Takes one input.
    pub fn handle(&mut self, now: Duration, input: Input) {
        match input {
            Input::Observed(observation) => self.observed(now, &observation),
            Input::Duty(duty) => self.take_duty(duty),
            Input::Ended { id, outcome } => {
                if let Some((_, action)) = self.busy.take_if(|(busy, _)| *busy == id) {
                    self.ended(now, action, outcome);
                }
            }
            Input::Tick => {}
        }
        while self.advance(now) {}
    }

    /// The next thing to do.
    pub fn poll_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    /// When to call `handle` with [`Input::Tick`] at the latest; `None` while only an input can change anything.
    pub fn poll_timeout(&self) -> Option<Duration> {
        match self.phase {
            _ if self.busy.is_some() || self.duty != Duty::Active => None,
            Phase::Watching if self.is_due() => Some(self.not_before),
            Phase::Dying { prove_at, .. } => Some(prove_at),
            Phase::Rising { give_up_at } if !self.may_yet_rise() => Some(give_up_at),
            _ => None,
        }
    }

    /// What the last look meant, as far as it still holds.
    pub fn verdict(&self) -> Option<&Verdict> {
        self.verdict.as_ref()
    }

    /// What must survive a restart of the guard.
    pub fn memory(&self) -> Memory {
        self.memory
    }

    /// Where it stands, in a word: `inactive`, `paused`, `unknown`, `healthy`, `suspect`, `unhealthy`, `starting`,
    /// `maintenance`, `first-run`, `unknown-state`, `correcting` or `escalated`.
    pub fn word(&self) -> &str {
        match (self.duty, self.phase, &self.verdict) {
            (Duty::Inactive | Duty::Unknown, ..) => "inactive",
            (Duty::Paused, ..) => "paused",
            (_, Phase::Escalated | Phase::Fence | Phase::Failover { .. }, _) => "escalated",
            (_, Phase::Stop(_) | Phase::Dying { .. } | Phase::Kill(_) | Phase::Start | Phase::Rising { .. }, _) => "correcting",
            (.., Some(Verdict::Healthy)) => "healthy",
            (.., Some(Verdict::HandsOff(why))) => why.word(),
            (.., Some(Verdict::Unhealthy(_))) if self.failures < self.limits.failures => "suspect",
            (.., Some(Verdict::Unhealthy(_))) => "unhealthy",
            (.., None) => "unknown",
        }
    }

    fn take_duty(&mut self, duty: Duty) {
        if duty == self.duty {
            return;
        }
        // A person who resumes has looked; a new term as active is a new beginning. Not so the first word after a restart.
        let is_anew = self.duty == Duty::Paused || duty == Duty::Inactive;
        self.duty = duty;
        (self.verdict, self.failures, self.hopeless, self.healthy_since) = (None, 0, 0, None);
        if is_anew {
            self.remember(Memory::default());
        }
        self.phase = if self.memory.escalated { Phase::Escalated } else { Phase::Watching };
    }

    fn observed(&mut self, now: Duration, observation: &Observation) {
        if self.duty != Duty::Active || observation.began < self.looks_from {
            return;
        }
        let is_young_too_long = self.young_since.is_some_and(|since| now >= since + self.limits.start_limit);
        let youth = if is_young_too_long { Youth::Over } else { Youth::Within(self.limits.start_limit) };
        let verdict = observation.judge(self.ran, youth);
        match &verdict {
            Verdict::HandsOff(HandsOff::Young) => {
                self.young_since.get_or_insert(now);
            }
            Verdict::Unhealthy(_) => {}
            _ => self.young_since = None,
        }
        if let (Health::Running, Process::Alive { incarnation, .. }) = (&observation.health, observation.process) {
            self.ran = Some(incarnation);
        }
        let is_gone = matches!((&observation.health, observation.process), (Health::Failed(_), Process::Gone));
        let is_broken = matches!((&verdict, &observation.disk), (Verdict::Unhealthy(_), DiskState::Failed(_)));
        self.hopeless = if is_gone || is_broken { self.hopeless.saturating_add(1).min(self.limits.failures) } else { 0 };
        self.failures = match verdict {
            Verdict::Unhealthy(_) => self.failures.saturating_add(1).min(self.limits.failures),
            _ => 0,
        };
        match verdict {
            Verdict::Healthy => drop(self.healthy_since.get_or_insert(now)),
            _ => self.healthy_since = None,
        }
        self.tell_of(&verdict, &observation.disk);
        self.verdict = Some(verdict);
    }

    /// Tells once of what lasts and isn't acted on.
    fn tell_of(&mut self, verdict: &Verdict, disk: &DiskState) {
        match verdict {
            Verdict::HandsOff(HandsOff::FirstRun) => self.tell_once(News::FirstRun),
            Verdict::HandsOff(HandsOff::Unknown(state)) => self.tell_once(News::UnknownState(state.clone())),
            Verdict::HandsOff(HandsOff::Starting) => {}
            _ => self.told = None,
        }
        match disk {
            DiskState::Scarce(why) if !self.is_scarce => {
                self.is_scarce = true;
                self.tell(News::Scarce(why.clone()));
            }
            DiskState::Good => self.is_scarce = false,
            DiskState::Scarce(_) | DiskState::Failed(_) => {}
        }
    }

    fn ended(&mut self, now: Duration, action: Action, outcome: Outcome) {
        match (action, &mut self.phase, outcome) {
            // How a stop or a kill ended doesn't matter: the proof does.
            (Action::Stop, Phase::Dying { prove_at, .. }, _) => *prove_at = now,
            (Action::Kill, Phase::Dying { until, prove_at, .. }, _) => (*until, *prove_at) = (now + self.limits.kill_wait, now),
            (Action::Prove, Phase::Dying { goal: Goal::Restart, .. }, Outcome::Done) => self.phase = Phase::Start,
            (Action::Prove, Phase::Dying { goal: Goal::HandOver, .. }, Outcome::Done) => {
                self.phase = Phase::Failover { proven_dead: true };
            }
            (Action::Prove, Phase::Dying { goal, until, means, .. }, Outcome::Failed(alive)) if now >= *until => match (*means, *goal) {
                (Means::Asked, goal) => self.phase = Phase::Kill(goal),
                (Means::Killed, Goal::Restart) => self.attempt_failed(now, format!("not dead: {alive}")),
                (Means::Killed, Goal::HandOver) => self.hand_over_undead(),
            },
            (Action::Prove, Phase::Dying { until, prove_at, .. }, Outcome::Failed(_)) => {
                *prove_at = (now + self.limits.prove_every).min(*until);
            }
            // Looks while it was being started found nothing yet, however often.
            (Action::Start, Phase::Rising { .. }, Outcome::Done) => (self.failures, self.hopeless) = (0, 0),
            (Action::Start, Phase::Rising { .. }, Outcome::Failed(why)) => self.attempt_failed(now, why),
            (Action::FenceSelf, Phase::Fence, Outcome::Done) => self.phase = Phase::Failover { proven_dead: false },
            (Action::FenceSelf, Phase::Fence, Outcome::Failed(why)) => {
                self.escalate();
                self.tell(News::Withheld(why));
            }
            (Action::Failover { .. }, Phase::Escalated, Outcome::Done) => self.tell(News::HandedOver),
            (Action::Failover { .. }, Phase::Escalated, Outcome::Failed(why)) => self.tell(News::FailoverFailed(why)),
            // The ladder was left meanwhile.
            _ => {}
        }
    }

    fn hand_over_undead(&mut self) {
        self.phase = match self.limits.before_failover {
            BeforeFailover::Fence => Phase::Fence,
            BeforeFailover::CommandFences => Phase::Failover { proven_dead: false },
        };
    }

    fn attempt_failed(&mut self, now: Duration, why: String) {
        let attempt = self.memory.attempts.saturating_add(1);
        self.remember(Memory { attempts: attempt, ..self.memory });
        self.tell(News::AttemptFailed { attempt, why });
        let factor = 1u32.checked_shl(attempt - 1).unwrap_or(u32::MAX);
        self.not_before = now + self.limits.backoff.saturating_mul(factor).min(self.limits.backoff_max);
        (self.failures, self.hopeless) = (0, 0);
        self.phase = Phase::Watching;
        if attempt >= self.limits.attempts && matches!(self.verdict, None | Some(Verdict::Unhealthy(_))) {
            self.phase = Phase::Stop(Goal::HandOver);
        }
    }

    /// Takes one step of its own; false when there is none.
    fn advance(&mut self, now: Duration) -> bool {
        self.forget(now);
        if self.busy.is_some() || self.duty != Duty::Active {
            return false;
        }
        if let (true, Some(Verdict::HandsOff(why))) = (self.phase.is_about_to_act(), &self.verdict) {
            let why = why.clone();
            self.tell(News::LeftAlone(why));
            self.phase = Phase::Watching;
        }
        match self.phase {
            Phase::Watching if self.is_due() && now >= self.not_before => {
                if let Some(Verdict::Unhealthy(why)) = self.verdict.clone() {
                    self.tell(News::Correcting(why));
                }
                let is_last = self.memory.attempts >= self.limits.attempts;
                self.phase = Phase::Stop(if is_last { Goal::HandOver } else { Goal::Restart });
                return true;
            }
            Phase::Stop(goal) => {
                let until = now + self.limits.stop_wait;
                self.act(Action::Stop);
                self.phase = Phase::Dying { goal, until, prove_at: now, means: Means::Asked };
            }
            Phase::Kill(goal) => {
                self.act(Action::Kill);
                self.phase = Phase::Dying { goal, until: now + self.limits.kill_wait, prove_at: now, means: Means::Killed };
            }
            Phase::Dying { prove_at, .. } if now >= prove_at => self.act(Action::Prove),
            Phase::Start => {
                self.act(Action::Start);
                self.phase = Phase::Rising { give_up_at: now + self.limits.start_limit };
                self.looks_from = now;
                (self.verdict, self.failures, self.hopeless, self.healthy_since, self.young_since) = (None, 0, 0, None, None);
            }
            Phase::Rising { give_up_at } => return self.rise(now, give_up_at),
            Phase::Fence => self.act(Action::FenceSelf),
            Phase::Failover { proven_dead } => {
                self.escalate();
                self.tell(News::Escalated { proven_dead });
                self.act(Action::Failover { proven_dead });
            }
            Phase::Watching | Phase::Dying { .. } | Phase::Escalated => {}
        }
        false
    }

    fn rise(&mut self, now: Duration, give_up_at: Duration) -> bool {
        match &self.verdict {
            Some(Verdict::Healthy) => {
                self.tell(News::Corrected);
                self.phase = Phase::Watching;
            }
            _ if self.hopeless >= self.limits.failures => {
                let why = match &self.verdict {
                    Some(Verdict::Unhealthy(why)) => why.as_str(),
                    _ => "it is gone",
                };
                let why = format!("not healthy after its start: {why}");
                self.attempt_failed(now, why);
            }
            Some(Verdict::HandsOff(HandsOff::Starting)) if now >= give_up_at => {
                self.tell_once(News::StartSlow);
                return false;
            }
            _ if now < give_up_at || self.may_yet_rise() => return false,
            Some(Verdict::Unhealthy(why)) => {
                let why = format!("not healthy in time: {why}");
                self.attempt_failed(now, why);
            }
            _ => self.attempt_failed(now, "no answer in time".into()),
        }
        true
    }

    /// Whether a start isn't given up at its limit.
    fn may_yet_rise(&self) -> bool {
        matches!(&self.verdict, Some(Verdict::HandsOff(why)) if *why != HandsOff::Young && *why != HandsOff::Starting)
            || matches!((&self.verdict, &self.told), (Some(Verdict::HandsOff(HandsOff::Starting)), Some(News::StartSlow)))
    }

    fn is_due(&self) -> bool {
        self.failures >= self.limits.failures && matches!(self.verdict, Some(Verdict::Unhealthy(_)))
    }

    fn forget(&mut self, now: Duration) {
        let is_long = self.healthy_since.is_some_and(|since| now >= since + self.limits.forget_after);
        if is_long && self.memory != Memory::default() && self.busy.is_none() {
            self.remember(Memory::default());
            self.tell(News::Forgotten);
            self.phase = Phase::Watching;
        }
    }

    fn escalate(&mut self) {
        self.remember(Memory { escalated: true, ..self.memory });
        self.phase = Phase::Escalated;
    }

    fn act(&mut self, action: Action) {
        let id = self.next_id;
        self.next_id += 1;
        self.busy = Some((id, action));
        self.effects.push_back(Effect::Act { id, action });
    }

    fn remember(&mut self, memory: Memory) {
        if memory != self.memory {
            self.memory = memory;
            self.effects.push_back(Effect::Remember(memory));
        }
    }

    fn tell(&mut self, news: News) {
        self.effects.push_back(Effect::Tell(news));
    }

    fn tell_once(&mut self, news: News) {
        if self.told.as_ref() != Some(&news) {
            self.told = Some(news.clone());
            self.tell(news);
        }
    }
}

impl Phase {
    /// Whether what comes next changes the application's fate.
    fn is_about_to_act(self) -> bool {
        !matches!(self, Phase::Watching | Phase::Rising { .. } | Phase::Escalated)
    }
}

#[cfg(test)]
mod tests;
