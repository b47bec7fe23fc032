//! What one look at the application found, and what that means.

use std::time::Duration;

/// What the application says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Health {
    /// It serves.
    Running,
    /// It is on its way.
    Starting,
    /// A person or a backup has it in hand.
    Maintenance,
    /// It serves its set-up page: a home or a database that it doesn't know.
    FirstRun,
    /// A state that isn't known here.
    Unknown(String),
    /// It says that it failed, or gives no answer that could be one.
    Failed(String),
}

/// The application's main process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Process {
    /// Nothing tells which it is.
    Unknown,
    /// There is none.
    Gone,
    /// There is one.
    Alive {
        /// Differs from that of every other process before and after it.
        incarnation: u64,
        /// How long it has been there.
        age: Duration,
    },
}

/// The filesystem of the home.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DiskState {
    /// Takes a write, durably and in time.
    Good,
    /// Nearly full: a restart doesn't help, a person does.
    Scarce(String),
    /// Refuses writes, or doesn't answer.
    Failed(String),
}

/// One look.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Observation {
    /// When it began, on the ladder's clock: it may tell of any moment from then on.
    pub began: Duration,
    /// What the application says.
    pub health: Health,
    /// Its main process.
    pub process: Process,
    /// Where its home is.
    pub disk: DiskState,
}

/// What a look means.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// All is well.
    Healthy,
    /// It isn't serving, and isn't to be touched.
    HandsOff(HandsOff),
    /// To be corrected when it lasts.
    Unhealthy(String),
}

/// Why an application that doesn't serve isn't touched.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum HandsOff {
    /// It says that it starts.
    Starting,
    /// It doesn't answer yet, and its process is young and never served.
    Young,
    /// It says that it is in maintenance.
    Maintenance,
    /// It says that it is set up for the first time.
    FirstRun,
    /// It says something else.
    Unknown(String),
}

impl HandsOff {
    /// In a word.
    pub fn word(&self) -> &str {
        match self {
            HandsOff::Starting | HandsOff::Young => "starting",
            HandsOff::Maintenance => "maintenance",
            HandsOff::FirstRun => "first-run",
            HandsOff::Unknown(_) => "unknown-state",
        }
    }
}

/// Whether a process that doesn't answer may still be on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Youth {
    /// A process that never served has this long from its start.
    Within(Duration),
    /// New processes have come and gone for too long.
    Over,
}

impl Observation {
    /// Says what it means; `ran` is the process that was last seen to serve.
    pub fn judge(&self, ran: Option<u64>, youth: Youth) -> Verdict {
        match (&self.health, &self.disk) {
            (Health::Starting, _) => Verdict::HandsOff(HandsOff::Starting),
            (Health::Maintenance, _) => Verdict::HandsOff(HandsOff::Maintenance),
            (Health::FirstRun, _) => Verdict::HandsOff(HandsOff::FirstRun),
            (Health::Unknown(state), _) => Verdict::HandsOff(HandsOff::Unknown(state.clone())),
            (Health::Running, DiskState::Failed(why)) => Verdict::Unhealthy(why.clone()),
            (Health::Running, _) => Verdict::Healthy,
            (Health::Failed(why), _) => match (self.process, youth) {
                (Process::Alive { incarnation, age }, Youth::Within(limit)) if age < limit && ran != Some(incarnation) => {
                    Verdict::HandsOff(HandsOff::Young)
                }
                _ => Verdict::Unhealthy(why.clone()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(health: Health, process: Process, disk: DiskState, expected: Verdict) {
        let observation = Observation { began: Duration::ZERO, health, process, disk };
        assert_eq!(observation.judge(Some(1), Youth::Within(Duration::from_secs(60))), expected);
    }

    #[test]
    fn only_what_failed_is_unhealthy() {
        let alive = |incarnation, secs| Process::Alive { incarnation, age: Duration::from_secs(secs) };
        let failed = || Health::Failed("refused".into());
        let (full, broken) = (DiskState::Scarce("full".into()), DiskState::Failed("EIO".into()));
        check(Health::Running, alive(1, 5), DiskState::Good, Verdict::Healthy);
        check(Health::Running, Process::Gone, full.clone(), Verdict::Healthy);
        check(Health::Running, alive(1, 5), broken.clone(), Verdict::Unhealthy("EIO".into()));
        for (health, why) in [
            (Health::Starting, HandsOff::Starting),
            (Health::Maintenance, HandsOff::Maintenance),
            (Health::FirstRun, HandsOff::FirstRun),
            (Health::Unknown("X".into()), HandsOff::Unknown("X".into())),
        ] {
            check(health, Process::Gone, broken.clone(), Verdict::HandsOff(why));
        }
        check(failed(), Process::Gone, DiskState::Good, Verdict::Unhealthy("refused".into()));
        check(failed(), Process::Unknown, full, Verdict::Unhealthy("refused".into()));
        check(failed(), alive(2, 59), DiskState::Good, Verdict::HandsOff(HandsOff::Young));
        check(failed(), alive(2, 60), DiskState::Good, Verdict::Unhealthy("refused".into()));
        check(failed(), alive(1, 5), DiskState::Good, Verdict::Unhealthy("refused".into()));
    }

    #[test]
    fn new_processes_again_and_again_are_no_start() {
        let process = Process::Alive { incarnation: 7, age: Duration::from_secs(1) };
        let health = Health::Failed("refused".into());
        let observation = Observation { began: Duration::ZERO, health, process, disk: DiskState::Good };
        assert_eq!(observation.judge(None, Youth::Over), Verdict::Unhealthy("refused".into()));
    }
}
