//! What the ladder takes and gives.

use std::fmt;
use std::time::Duration;

use crate::observation::{HandsOff, Observation};

/// The ladder's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Limits {
    /// Looks in a row that have to find it unhealthy.
    pub failures: u32,
    /// How long the application may take to stop, with a margin; then it is killed.
    pub stop_wait: Duration,
    /// How long what was killed may take to be gone.
    pub kill_wait: Duration,
    /// Between two tries to prove it dead.
    pub prove_every: Duration,
    /// How long the application may take until it serves.
    pub start_limit: Duration,
    /// Attempts before another host takes over.
    pub attempts: u32,
    /// Between attempts; doubles up to `backoff_max`.
    pub backoff: Duration,
    /// The longest that becomes.
    pub backoff_max: Duration,
    /// Health for so long lets attempts be forgotten.
    pub forget_after: Duration,
    /// What must be sure before the failover command runs.
    pub before_failover: BeforeFailover,
}

/// What must be sure before the failover command runs, when the application can't be proven dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BeforeFailover {
    /// This host's fence command has to succeed.
    Fence,
    /// Nothing: the failover command fences this host itself.
    CommandFences,
}

/// Whether this host's application is to be kept alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Duty {
    /// It is: the control record says active.
    Active,
    /// It isn't: the control record says something else.
    Inactive,
    /// The control record can't be read.
    Unknown,
    /// A person said so.
    Paused,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Input {
    /// Somebody looked.
    Observed(Observation),
    /// Whether to guard.
    Duty(Duty),
    /// An action ended.
    Ended {
        /// That of the action.
        id: u64,
        /// What came of it.
        outcome: Outcome,
    },
    /// Time has passed.
    Tick,
}

/// What came of an action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It succeeded; of [`Action::Prove`]: dead.
    Done,
    /// It failed, ran out of time, or isn't configured; of [`Action::Prove`]: who is alive.
    Failed(String),
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Effect {
    /// Perform it, and answer with [`Input::Ended`].
    Act {
        /// For the answer.
        id: u64,
        /// What.
        action: Action,
    },
    /// Store it, durably, before the effects behind it are performed.
    Remember(Memory),
    /// Tell people.
    Tell(News),
}

/// What may be done to the application.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Ask it to stop.
    Stop,
    /// Kill it.
    Kill,
    /// Find out whether anything of it is alive.
    Prove,
    /// Start it.
    Start,
    /// Fence this host.
    FenceSelf,
    /// Hand over.
    Failover {
        /// Whether the application is proven dead.
        proven_dead: bool,
    },
}

/// What must survive a restart of the guard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Memory {
    /// Attempts that failed since the application was last healthy for long.
    pub attempts: u32,
    /// Whether the failover command was decided on.
    pub escalated: bool,
}

/// What people are told.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum News {
    /// A correction begins.
    Correcting(String),
    /// A correction is given up: the application says hands off.
    LeftAlone(HandsOff),
    /// It serves again.
    Corrected,
    /// An attempt failed.
    AttemptFailed {
        /// Which.
        attempt: u32,
        /// Why.
        why: String,
    },
    /// It has been starting for longer than its limit; it is left alone.
    StartSlow,
    /// It shows its set-up page: wrong home or wrong database.
    FirstRun,
    /// It says a state that isn't known; it is left alone.
    UnknownState(String),
    /// The home's filesystem is nearly full.
    Scarce(String),
    /// The attempts are used up: another host has to take over.
    Escalated {
        /// Whether the application is proven dead.
        proven_dead: bool,
    },
    /// Another host would have to take over, but neither is the application proven dead nor this host fenced.
    Withheld(String),
    /// The failover command succeeded.
    HandedOver,
    /// The failover command failed.
    FailoverFailed(String),
    /// After all it has been healthy for long: attempts are forgotten.
    Forgotten,
}

impl News {
    /// In a word, for `COLDSPARE_EVENT`.
    pub fn word(&self) -> &'static str {
        match self {
            News::Correcting(_) => "correcting",
            News::LeftAlone(_) => "left-alone",
            News::Corrected => "corrected",
            News::AttemptFailed { .. } => "attempt-failed",
            News::StartSlow => "start-slow",
            News::FirstRun => "first-run",
            News::UnknownState(_) => "unknown-state",
            News::Scarce(_) => "disk-scarce",
            News::Escalated { .. } => "escalated",
            News::Withheld(_) => "withheld",
            News::HandedOver => "handed-over",
            News::FailoverFailed(_) => "failover-failed",
            News::Forgotten => "forgotten",
        }
    }

    /// Whether a person has to act.
    pub fn is_grave(&self) -> bool {
        !matches!(self, News::Corrected | News::Forgotten | News::HandedOver | News::LeftAlone(_))
    }
}

impl fmt::Display for News {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            News::Correcting(why) => write!(f, "the application is unhealthy ({why}); it is stopped and started again"),
            News::LeftAlone(why) => write!(f, "the correction is given up: the application says {}", why.word()),
            News::Corrected => write!(f, "the application serves again"),
            News::AttemptFailed { attempt, why } => write!(f, "attempt {attempt} to correct the application failed: {why}"),
            News::StartSlow => write!(f, "the application has been starting for longer than its limit; it is left alone: look at its log"),
            News::FirstRun => write!(f, "the application shows its set-up page: wrong home, or wrong database; it is left alone"),
            News::UnknownState(state) => write!(f, "the application says it is {state:?}, which isn't known here; it is left alone"),
            News::Scarce(why) => write!(f, "{why}; a restart would not help: make room"),
            News::Escalated { proven_dead: true } => write!(f, "all attempts failed, the application is dead: the failover command runs"),
            News::Escalated { proven_dead: false } => {
                write!(f, "all attempts failed, the application may be alive, this host is fenced or will be: the failover command runs")
            }
            News::Withheld(why) => write!(
                f,
                "all attempts failed, the application may be alive, and this host isn't fenced ({why}): no failover. Fence it by hand"
            ),
            News::HandedOver => write!(f, "the failover command succeeded"),
            News::FailoverFailed(why) => write!(f, "the failover command failed: {why}; it is not run again"),
            News::Forgotten => write!(f, "the application has been healthy for long: earlier attempts are forgotten"),
        }
    }
}
