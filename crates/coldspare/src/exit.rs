//! Exit codes, and errors as an administrator reads them.

use std::fmt;

/// Why the program ends; stable, scripts rely on the numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Code {
    /// Done, or consistent.
    Done = 0,
    /// Differences were found, or a safety rule refused.
    Differs = 1,
    /// Usage or configuration.
    Usage = 2,
    /// The peer can't be reached, or time ran out.
    Unreachable = 3,
    /// Fenced, in conflict, or of another epoch or pair.
    Fenced = 4,
    /// Damage or a shortage that needs a person.
    Damage = 5,
}

/// The end of a command that did not do what it was asked for.
#[derive(Debug)]
pub struct Failure {
    /// For the caller's script.
    pub code: Code,
    /// For a person: what happened, to which path, what to do next.
    pub message: String,
    /// Whether a daemon may expect that it passes, and try again.
    pub passes: bool,
}

impl Failure {
    /// Wrong usage or configuration.
    pub fn usage(message: impl fmt::Display) -> Failure {
        Failure { code: Code::Usage, message: message.to_string(), passes: false }
    }

    /// The peer, or a daemon, can't be reached.
    pub fn unreachable(message: impl fmt::Display) -> Failure {
        Failure { code: Code::Unreachable, message: message.to_string(), passes: false }
    }

    /// Fenced, in conflict, or of another pair.
    pub fn fenced(message: impl fmt::Display) -> Failure {
        Failure { code: Code::Fenced, message: message.to_string(), passes: false }
    }

    /// A safety rule refuses.
    pub fn refused(message: impl fmt::Display) -> Failure {
        Failure { code: Code::Differs, message: message.to_string(), passes: false }
    }

    /// A shortage that may pass, such as a full disk.
    pub fn shortage(message: impl fmt::Display) -> Failure {
        Failure { passes: true, ..Failure::damage(message) }
    }

    /// Damage or a shortage.
    pub fn damage(message: impl fmt::Display) -> Failure {
        Failure { code: Code::Damage, message: message.to_string(), passes: false }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// What a command returns.
pub type Outcome = Result<Code, Failure>;
