//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::config::{HookName, Profile};

/// Keeps the home directory of a Bitbucket instance ready on a cold standby.
#[derive(Debug, Parser)]
#[command(name = "coldspare", version = crate::BUILD, max_term_width = 110)]
#[command(after_help = "Exit codes: 0 done or consistent; 1 differences found or refused by a safety rule; 2 usage or configuration;\n\
3 peer unreachable or timed out; 4 fenced, conflict or wrong epoch; 5 damage that needs a person.")]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show it at work on this machine: two hosts on loopback with real git repositories
    Demo {
        /// A folder to make for it [default: a temporary one]
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
        /// Keep the folder
        #[arg(long)]
        keep: bool,
    },
    /// What it would cost and give here: from the real home and a rehearsal with some of its files, which are only read
    Plan {
        /// The home; once more for each data store
        #[arg(long = "home", value_name = "DIR", required = true)]
        homes: Vec<PathBuf>,
        /// A folder to make for the rehearsal, on a disk like the standby's, with 1 GB of room [default: a temporary one]
        #[arg(long, value_name = "DIR")]
        scratch: Option<PathBuf>,
        /// Rehearse with the standby that `plan-peer` serves on another host, so that the link and its disk are in what is
        /// measured: the line that it printed [default: both ends on this host]
        #[arg(long, value_name = "TEXT")]
        invite: Option<String>,
        /// Watch the home for so long and take what really is written, rewrites each time and removals too, for all of a day:
        /// 30s, 5m, 24h. By fanotify, as root; else by inotify, a watch a folder [default: what times of files tell]
        #[arg(long, value_name = "DURATION", value_parser = parse_watch)]
        watch: Option<Duration>,
        /// Links to look at, in bits a second
        #[arg(long, value_name = "RATE", value_delimiter = ',', default_value = "10M,100M,1G", value_parser = crate::plan::parse_link)]
        links: Vec<f64>,
        /// The lag that is acceptable
        #[arg(long, default_value = "60s", value_parser = parse_duration)]
        lag: Duration,
        /// As if the home were as large as this: repositories=N, entries=N or bytes=N
        #[arg(long, value_name = "MEASURE", value_parser = crate::plan::parse_scale)]
        scale: Option<(crate::plan::Measure, f64)>,
        /// Draw the lag over the last day for each link, as SVG
        #[arg(long, value_name = "FILE")]
        plot: Option<PathBuf>,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Serve as the standby of one rehearsal of `plan --invite`, in a folder that is removed at the end, until Ctrl-C
    PlanPeer {
        /// Where to listen, UDP
        #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:7420")]
        listen: String,
        /// The address that the active's host uses [default: the one to listen at; of 0.0.0.0 this host's name]
        #[arg(long, value_name = "HOST[:PORT]")]
        advertise: Option<String>,
        /// A folder to make for it, on the disk that the standby is to have, with 1 GB of room [default: a temporary one]
        #[arg(long, value_name = "DIR")]
        scratch: Option<PathBuf>,
    },
    /// Set up this host as standby or as active
    #[command(subcommand)]
    Init(InitCommand),
    /// Send changes to the standby (on the active)
    Send {
        #[command(flatten)]
        config: ConfigArg,
        /// Until the standby has everything as of now, then exit
        #[arg(long)]
        once: bool,
        /// With --once: print a JSON object
        #[arg(long, requires = "once")]
        json: bool,
    },
    /// Receive changes from the active (on the standby)
    Receive {
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Send or receive, as this host's role says, and go on as the other when the roles change
    Run {
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Change roles without loss (on the active): stop writing, send the rest, hand over, become the standby
    Switchover {
        #[command(flatten)]
        config: ConfigArg,
        /// Hand over though files are held back: the standby has them as they were, or not
        #[arg(long)]
        accept_held_back: bool,
        /// How long all of it may take: 500ms, 30s, 5m
        #[arg(long, default_value = "5m", value_parser = parse_duration)]
        timeout: Duration,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Give the active's role up: hand over to a standby that is promoted later, or become its standby when fenced
    Demote {
        #[command(flatten)]
        config: ConfigArg,
        /// Hand over though files are held back: the standby has them as they were, or not
        #[arg(long)]
        accept_held_back: bool,
        /// How long all of it may take: 500ms, 30s, 5m
        #[arg(long, default_value = "5m", value_parser = parse_duration)]
        timeout: Duration,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Take what the roots hold for what the standby has, so that it isn't sent again (on the standby, without a daemon)
    Adopt {
        #[command(flatten)]
        config: ConfigArg,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Make this host the active (on the standby)
    Promote {
        #[command(flatten)]
        config: ConfigArg,
        #[command(flatten)]
        terms: TermsArgs,
        /// Then start the application here, wait until it serves, and route requests here by the hooks
        #[arg(long)]
        start: bool,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Fence the old active by the configured command, then promote this host (on the standby)
    Failover {
        #[command(flatten)]
        config: ConfigArg,
        #[command(flatten)]
        terms: TermsArgs,
        /// Then start the application here, wait until it serves, and route requests here by the hooks
        #[arg(long)]
        start: bool,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Return when all that was written before is durable on the standby (on the active)
    Checkpoint {
        #[command(flatten)]
        config: ConfigArg,
        /// How long to wait: 500ms, 30s, 5m
        #[arg(long, default_value = "30s", value_parser = parse_duration)]
        timeout: Duration,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Show where this host's daemon stands
    Status {
        #[command(flatten)]
        config: ConfigArg,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
        /// Again every second
        #[arg(long)]
        watch: bool,
    },
    /// Tell whether the standby is what its manifest says, and that what the connected active sent (on the standby)
    Verify {
        #[command(flatten)]
        config: ConfigArg,
        /// Metadata of every entry (the default)
        #[arg(long, conflicts_with = "deep")]
        quick: bool,
        /// Extended attributes and every byte too
        #[arg(long)]
        deep: bool,
        /// Repositories too: references, alternates, and by git itself that no object is missing
        #[arg(long)]
        git: bool,
        /// Put right what differs: what doesn't belong there is moved to quarantine, content comes from the active again
        #[arg(long)]
        repair: bool,
        /// Go on where the last `verify --deep --resume` was broken off, or begin one that can be
        #[arg(long, requires = "deep", conflicts_with = "repair")]
        resume: bool,
        /// Bytes a second to read at most, instead of `verify.bytes_per_second`; 0: as many as there are
        #[arg(long, value_name = "N")]
        bytes_per_second: Option<u64>,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Apply what waits for a decision, whatever it takes from the standby (on the standby)
    Accept {
        #[command(flatten)]
        config: ConfigArg,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Keep the standby as it is, until the active has again what is missing (on the standby)
    Reject {
        #[command(flatten)]
        config: ConfigArg,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// List the points that the standby can go back to (on the standby)
    Points {
        #[command(flatten)]
        config: ConfigArg,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Bring the standby back to a point, where it stays until `resume` or a promotion (on the standby)
    Rewind {
        #[command(flatten)]
        config: ConfigArg,
        /// A number of `points`; latest; or a time such as 2026-01-31T12:00:00Z, for the last point that is not younger
        #[arg(long, value_name = "POINT")]
        to: String,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Write a copy of a point that can be written into, for a drill, while replication goes on (on the standby)
    Export {
        #[command(flatten)]
        config: ConfigArg,
        /// A number of `points`; latest; or a time such as 2026-01-31T12:00:00Z, for the last point that is not younger
        #[arg(long, default_value = "latest")]
        point: String,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
        /// An empty folder, or one to make; on the standby's filesystem nothing has to be copied if that can share blocks
        dir: PathBuf,
    },
    /// Follow the active again after a `rewind` (on the standby)
    Resume {
        #[command(flatten)]
        config: ConfigArg,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Keep the application alive on the active: stop, kill and start it when it fails, hand over when that doesn't help
    Guard {
        #[command(flatten)]
        config: ConfigArg,
        /// Show where the guard that runs stands
        #[arg(long, group = "instead")]
        status: bool,
        /// With --status: print a JSON object
        #[arg(long, requires = "status")]
        json: bool,
        /// Have nothing done to the application until --resume, such as for an upgrade
        #[arg(long, group = "instead")]
        pause: bool,
        /// Guard again, and forget what was tried before
        #[arg(long, group = "instead")]
        resume: bool,
    },
    /// Start, stop and look at the application of this host
    #[command(subcommand)]
    Application(ApplicationCommand),
    /// Run one of the configuration's commands, as coldspare would
    Hook {
        /// start, stop, kill, status, fence, fence-self, route, notify, drain, promote or failover
        name: HookName,
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Tell load balancers whether requests may be sent here: on the active only
    Health {
        #[command(flatten)]
        config: ConfigArg,
        /// Print one answer; exit code 0 if they may, else 1
        #[arg(long)]
        once: bool,
    },
    /// Check configuration, paths, owners, space and privileges of this host
    Check {
        #[command(flatten)]
        config: ConfigArg,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Make the roots read-only for everybody (on the standby, while no daemon runs)
    Seal {
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Take the seal off the roots: others can write there until the receiver starts again
    Unseal {
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Seal the roots for the daemon that started it (only `receive` runs it)
    #[command(name = crate::seal::COMMAND, hide = true)]
    SealHelper {
        /// The roots
        roots: Vec<PathBuf>,
    },
    /// Tell the daemon that started it of changes (only the daemons run it)
    #[command(name = crate::watching::COMMAND, hide = true)]
    WatchHelper {
        /// Tell who made them, too
        #[arg(long)]
        processes: bool,
        /// The roots
        roots: Vec<PathBuf>,
    },
    /// Write the man pages into a folder
    #[command(hide = true)]
    Man {
        /// The folder
        dir: PathBuf,
    },
}

/// What a promotion takes for granted.
#[derive(Debug, Args)]
pub(crate) struct TermsArgs {
    /// A program, and its arguments (none that begins with a hyphen), that succeeds only if the old active can write no more
    #[arg(long, value_name = "COMMAND", num_args = 1..)]
    fenced_by: Vec<String>,
    /// Nothing proves that the old active is gone: accept that there may be two, and what is lost
    #[arg(long)]
    accept_possible_loss: bool,
    /// Promote though paths differ from the manifest
    #[arg(long)]
    accept_damage: bool,
    /// Promote though the tree is older than `failover.max_lag_seconds`
    #[arg(long)]
    accept_lag: bool,
    /// Promote though the active is connected and did not hand over
    #[arg(long)]
    accept_connection: bool,
    /// Promote an earlier point: as `rewind` takes it; what is later goes to quarantine, and is listed
    #[arg(long, value_name = "POINT", conflicts_with = "database_position")]
    to: Option<String>,
    /// Promote the point that fits a database that stands there: the newest one of this position, or, of positions of PostgreSQL
    /// such as 16/B374D848, the first one ahead of it
    #[arg(long, value_name = "POSITION")]
    database_position: Option<String>,
}

impl Command {
    /// Whether much may pass through it, or it runs for weeks; the others end soon, and their threads needn't wait for each other.
    pub(crate) fn shares_one_heap(&self) -> bool {
        use Command::{Guard, Receive, Run, SealHelper, Send, WatchHelper};
        matches!(self, Send { .. } | Receive { .. } | Run { .. } | Guard { .. } | SealHelper { .. } | WatchHelper { .. })
    }
}

impl From<TermsArgs> for crate::promotion::Terms {
    fn from(args: TermsArgs) -> crate::promotion::Terms {
        let TermsArgs { fenced_by, accept_possible_loss, accept_damage, accept_lag, accept_connection, to, database_position } = args;
        let fence = false;
        crate::promotion::Terms {
            fenced_by,
            fence,
            accept_possible_loss,
            accept_damage,
            accept_lag,
            accept_connection,
            to,
            database_position,
        }
    }
}

/// The configuration of this host.
#[derive(Debug, Args)]
pub(crate) struct ConfigArg {
    /// The configuration file
    #[arg(long = "config", value_name = "FILE", default_value = "/etc/coldspare/coldspare.toml")]
    pub(crate) path: PathBuf,
}

/// What to do to the application.
#[derive(Debug, Subcommand)]
pub(crate) enum ApplicationCommand {
    /// Start it, if it is dead, and wait until it serves (on the active)
    Start {
        #[command(flatten)]
        config: ConfigArg,
    },
    /// Stop it for certain: ask, wait, kill, prove it dead
    Stop {
        #[command(flatten)]
        config: ConfigArg,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Look at it once: exit code 0 if it serves, 3 if it is stopped, else 1
    Status {
        #[command(flatten)]
        config: ConfigArg,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
    /// Tell who of it is alive: exit code 0 if nobody is, else 1
    ProveDead {
        #[command(flatten)]
        config: ConfigArg,
        /// Print a JSON object
        #[arg(long)]
        json: bool,
    },
}

/// Which role to set up.
#[derive(Debug, Subcommand)]
pub(crate) enum InitCommand {
    /// Make this host a standby; prints an invitation for its active
    Standby {
        #[command(flatten)]
        init: InitArgs,
        /// Where to listen, UDP [default: 0.0.0.0:7420]
        #[arg(long, value_name = "ADDR")]
        listen: Option<String>,
        /// The address that the active uses, when it isn't the one to listen at
        #[arg(long, value_name = "HOST[:PORT]")]
        advertise: Option<String>,
    },
    /// Make this host the active of the standby that invited
    Active {
        #[command(flatten)]
        init: InitArgs,
        /// The line that `init standby` printed
        #[arg(long, value_name = "TEXT")]
        invite: String,
        /// Where to listen, UDP, once roles are switched, and meanwhile for whoever takes itself for the active
        #[arg(long, value_name = "ADDR")]
        listen: Option<String>,
        /// The address that the standby uses for that, when it isn't the one to listen at
        #[arg(long, value_name = "HOST[:PORT]")]
        advertise: Option<String>,
    },
}

/// What both kinds of `init` take.
#[derive(Debug, Args)]
pub(crate) struct InitArgs {
    /// The home directory
    #[arg(long, value_name = "DIR")]
    pub(crate) home: PathBuf,
    /// A further folder to replicate, such as a data store; may be given several times
    #[arg(long = "root", value_name = "NAME=DIR", value_parser = parse_root)]
    pub(crate) roots: Vec<(String, PathBuf)>,
    /// The configuration file to write
    #[arg(long, value_name = "FILE")]
    pub(crate) config: PathBuf,
    /// The folder for identity and stores [default: the configuration's name with .state]
    #[arg(long, value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// The home's exclude list: bitbucket or none
    #[arg(long, default_value = "bitbucket", value_parser = parse_profile)]
    pub(crate) profile: Profile,
}

impl From<InitArgs> for crate::init::Init {
    fn from(args: InitArgs) -> crate::init::Init {
        let InitArgs { home, roots, config, state, profile } = args;
        crate::init::Init { home, roots, config, state, profile }
    }
}

fn parse_root(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, dir)) if !name.is_empty() && !dir.is_empty() => Ok((name.into(), dir.into())),
        _ => Err("expected NAME=DIR".into()),
    }
}

fn parse_profile(text: &str) -> Result<Profile, String> {
    match text {
        "bitbucket" => Ok(Profile::Bitbucket),
        "none" => Ok(Profile::None),
        _ => Err("expected bitbucket or none".into()),
    }
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| "expected a number and a unit, such as 30s".to_string())?;
    let ms = match unit {
        "ms" => 1,
        "s" | "" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(format!("unknown unit {unit:?}; use ms, s, m or h")),
    };
    number.checked_mul(ms).filter(|ms| *ms <= 7 * 86_400_000).map(Duration::from_millis).ok_or("more than a week".into())
}

fn parse_watch(text: &str) -> Result<Duration, String> {
    parse_duration(text).and_then(|d| if d < Duration::from_secs(1) { Err("less than a second tells nothing".into()) } else { Ok(d) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_have_units() {
        assert_eq!(parse_duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("5"), Ok(Duration::from_secs(5)));
        assert!(parse_duration("5 years").is_err());
        assert!(parse_duration("99999999999999999h").is_err());
    }
}
