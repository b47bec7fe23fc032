//! The configuration file: TOML, unknown keys are errors that name the line.
//!
//! Every default is in `docs/configuration.md`, from the same values.

mod guard;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use coldspare_core::brakes::Limits;
use coldspare_core::exclude::{BITBUCKET, Exclude};
use coldspare_standby::HistoryLimits;
use coldspare_transport::{Congestion, Tuning};
use serde::{Deserialize, Serialize};

use crate::bandwidth::{Bandwidth, Period, Schedule};
use crate::exit::Failure;
pub use guard::{ApplicationProfile, Guard, HealthSettings, HookConfig, HookName, Hooks};

/// All of the configuration; either host can become the active, so both hold what both roles need.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The file that it was read from; empty for one that wasn't.
    #[serde(skip)]
    pub path: PathBuf,
    /// The folder for identity, control record, stores and the socket of the daemon.
    pub state: PathBuf,
    /// Where this host listens, UDP: as a standby for its active, as the active for whoever takes itself for that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listen: Option<SocketAddr>,
    /// `host:port` by which the other host reaches it, when it isn't that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advertise: Option<String>,
    /// The other host.
    #[serde(default)]
    pub peer: Peer,
    /// What is replicated.
    #[serde(rename = "root")]
    pub roots: Vec<Root>,
    /// How the active works.
    #[serde(default)]
    pub send: Send,
    /// The link.
    #[serde(default)]
    pub link: LinkSettings,
    /// How the standby is verified.
    #[serde(default)]
    pub verify: Verify,
    /// What becomes of what others write on the standby.
    #[serde(default)]
    pub hands_off: HandsOff,
    /// From how much on a person is asked before the standby loses something.
    #[serde(default)]
    pub brakes: Brakes,
    /// How much of what the standby loses is kept, and how long.
    #[serde(default)]
    pub history: History,
    /// What a point says of the database.
    #[serde(default, skip_serializing_if = "Database::is_empty")]
    pub database: Database,
    /// The application, and how it is kept alive.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guard: Option<Guard>,
    /// Commands for what only this host's administrator knows.
    #[serde(default, skip_serializing_if = "Hooks::is_empty")]
    pub hooks: Hooks,
    /// Where load balancers ask.
    #[serde(default)]
    pub health: HealthSettings,
    /// How it takes that role without a handover.
    #[serde(default)]
    pub failover: Failover,
}

/// The other host.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Peer {
    /// `host:port` where it listens; a standby hears it from its active, if that listens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
}

/// One replicated folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Root {
    /// Its name, equal on both hosts.
    pub name: String,
    /// Where it is on this host, absolute.
    pub path: PathBuf,
    /// The built-in exclude list.
    #[serde(default)]
    pub profile: Profile,
    /// Patterns that are left out too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Patterns of the profile that are not left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<String>,
}

/// A built-in exclude list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// Nothing is left out.
    #[default]
    None,
    /// What a Bitbucket home rebuilds, or what is unsafe to copy live.
    Bitbucket,
}

/// How changes are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WatchMode {
    /// The best that is to be had: fanotify, inotify, scans.
    #[default]
    Auto,
    /// fanotify, or nothing.
    Fanotify,
    /// inotify, or nothing.
    Inotify,
    /// Scans only, for network filesystems.
    Scan,
}

/// How the active works.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Send {
    /// How changes are found.
    pub watch: WatchMode,
    /// Seconds between looks at everything while the watch covers all.
    pub full_scan_seconds: u64,
    /// Seconds between looks at everything while it doesn't.
    pub uncovered_scan_seconds: u64,
    /// Threads that look and read.
    pub threads: usize,
    /// zstd's level for content that shrinks, 1 to 19.
    pub compression_level: i32,
}

impl Default for Send {
    fn default() -> Send {
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        Send {
            watch: WatchMode::Auto,
            full_scan_seconds: 3600,
            uncovered_scan_seconds: 60,
            // Cold scans wait for the disk: more threads than cores.
            threads: cores.clamp(4, 16),
            compression_level: 1,
        }
    }
}

/// The link.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LinkSettings {
    /// Data streams, 1 to 12.
    pub streams: u16,
    /// How the sending rate is found.
    pub congestion: Congestion,
    /// Seconds of silence after which the peer is gone.
    pub idle_timeout_seconds: u64,
    /// The most that the active sends, where no period of `schedule` holds; without one as much as there is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bandwidth>,
    /// Times of the week in which another limit holds; the first that holds decides.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub schedule: Vec<Period>,
}

impl Default for LinkSettings {
    fn default() -> LinkSettings {
        LinkSettings { streams: 8, congestion: Congestion::default(), idle_timeout_seconds: 10, bandwidth: None, schedule: Vec::new() }
    }
}

/// How the standby is verified.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Verify {
    /// Days in which the scrub reads every byte once; 0: there is no scrub.
    pub scrub_days: u32,
    /// Bytes a second that a deep verification and the scrub read at most; 0: as many as there are.
    pub bytes_per_second: u64,
}

impl Default for Verify {
    fn default() -> Verify {
        Verify { scrub_days: 7, bytes_per_second: 0 }
    }
}

/// What becomes of what others write on the standby.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HandsOff {
    /// How it is noticed.
    pub watch: WatchMode,
    /// Whether it is put right without asking.
    pub heal: bool,
    /// Whether nobody but the receiver can write.
    pub seal: bool,
}

impl Default for HandsOff {
    fn default() -> HandsOff {
        HandsOff { watch: WatchMode::Auto, heal: true, seal: false }
    }
}

/// From how much on, in one root and within a while, a person is asked before the standby loses something.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Brakes {
    /// Whether anybody is asked.
    pub enabled: bool,
    /// Files outside of repositories that may go.
    pub removed_files: u64,
    /// Of a small root, the share of its entries that may go, in percent.
    pub removed_percent: u64,
    /// Repositories that may go.
    pub removed_repositories: u64,
    /// Files outside of repositories that may get content that looks encrypted.
    pub scrambled_files: u64,
    /// The while, in minutes.
    pub window_minutes: u64,
}

impl Default for Brakes {
    fn default() -> Brakes {
        let Limits { removed_files, removed_percent, removed_repositories, scrambled_files, window_minutes } = Limits::default();
        Brakes { enabled: true, removed_files, removed_percent, removed_repositories, scrambled_files, window_minutes }
    }
}

impl Brakes {
    /// As the standby takes them; `None` when nobody is asked.
    pub fn limits(&self) -> Option<Limits> {
        let Brakes { removed_files, removed_percent, removed_repositories, scrambled_files, window_minutes, .. } = *self;
        self.enabled.then_some(Limits { removed_files, removed_percent, removed_repositories, scrambled_files, window_minutes })
    }

    fn check(&self) -> Result<(), String> {
        if !(1..=100).contains(&self.removed_percent) {
            return Err(format!("removed_percent = {} is not between 1 and 100", self.removed_percent));
        }
        if !(1..=WINDOW_MINUTES_MAX).contains(&self.window_minutes) {
            return Err(format!("window_minutes = {} is not between 1 and {WINDOW_MINUTES_MAX}", self.window_minutes));
        }
        Ok(())
    }
}

/// What of replaced and removed content the standby keeps, so that it can go back.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct History {
    /// Minutes: the tree of any moment within them can be had again.
    pub age_minutes: u64,
    /// Bytes that are kept at most.
    pub space_bytes: u64,
    /// Bytes that stay free on each root's filesystem: below, what is kept goes first.
    pub free_bytes: u64,
}

impl Default for History {
    fn default() -> History {
        History { age_minutes: 24 * 60, space_bytes: 10 << 30, free_bytes: 1 << 30 }
    }
}

impl History {
    /// As the standby takes them.
    pub fn limits(&self) -> HistoryLimits {
        let History { age_minutes, space_bytes, free_bytes } = *self;
        HistoryLimits { age_ms: age_minutes.saturating_mul(60_000), space_bytes, free_bytes }
    }
}

/// The database of the application.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// A program, absolute, and its arguments: its last line says where the database stands.
    pub position: Vec<String>,
}

impl Database {
    fn is_empty(&self) -> bool {
        self.position.is_empty()
    }
}

/// LIMIT: minutes within which counts what was taken: the ledger has an entry for each.
const WINDOW_MINUTES_MAX: u64 = 1440;
/// How this host takes the active's role without a handover.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Failover {
    /// Seconds that the tree may be old.
    pub max_lag_seconds: u64,
}

impl Default for Failover {
    fn default() -> Failover {
        Failover { max_lag_seconds: 900 }
    }
}

/// LIMIT: days of a scrub.
const SCRUB_DAYS_MAX: u32 = 3650;
/// Where `receive` listens by default.
pub const DEFAULT_PORT: u16 = 7420;
/// LIMIT: periods of a week.
const SCHEDULE_MAX: usize = 100;
/// LIMIT: replicated folders.
const ROOTS_MAX: usize = 64;

impl Config {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// `Usage`, naming the file, the line where there is one, and what to do.
    pub fn load(path: &Path) -> Result<Config, Failure> {
        let text = std::fs::read_to_string(path)
            .map_err(|e| Failure::usage(format!("the configuration {} can't be read: {e}; `coldspare init` writes one", path.display())))?;
        let config = Config::parse(&text).map_err(|e| Failure::usage(format!("the configuration {}: {e}", path.display())))?;
        Ok(Config { path: path.into(), ..config })
    }

    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// In words, with the line where there is one.
    pub fn parse(text: &str) -> Result<Config, String> {
        let config: Config = toml::from_str(text).map_err(|e| e.to_string())?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if !self.state.is_absolute() {
            return Err(format!("state = {:?} must be an absolute path", self.state));
        }
        if self.roots.is_empty() || self.roots.len() > ROOTS_MAX {
            return Err(format!("{} [[root]] sections; it takes 1 to {ROOTS_MAX}", self.roots.len()));
        }
        for (n, root) in self.roots.iter().enumerate() {
            if root.name.is_empty() || root.name.len() > 64 || !root.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
            {
                return Err(format!("root name {:?}: letters, digits, '-', '_' and '.', at most 64", root.name));
            }
            if !root.path.is_absolute() {
                return Err(format!("root {:?}: path {:?} must be absolute", root.name, root.path));
            }
            if self.state.starts_with(&root.path) {
                return Err(format!("state = {:?} is inside root {:?}; it must be elsewhere", self.state, root.name));
            }
            root.exclude().map_err(|e| format!("root {:?}: {e}", root.name))?;
            for other in &self.roots[..n] {
                if other.name == root.name {
                    return Err(format!("two roots are called {:?}", root.name));
                }
                if other.path.starts_with(&root.path) || root.path.starts_with(&other.path) {
                    return Err(format!("root {:?} and root {:?} are inside each other", other.name, root.name));
                }
            }
        }
        if !(1..=19).contains(&self.send.compression_level) {
            return Err(format!("send.compression_level = {} is not between 1 and 19", self.send.compression_level));
        }
        if !(1..=256).contains(&self.send.threads) {
            return Err(format!("send.threads = {} is not between 1 and 256", self.send.threads));
        }
        if self.send.full_scan_seconds == 0 || self.send.uncovered_scan_seconds == 0 {
            return Err("send: seconds between scans must be above 0".into());
        }
        if self.verify.scrub_days > SCRUB_DAYS_MAX {
            return Err(format!("verify.scrub_days = {} is above {SCRUB_DAYS_MAX}", self.verify.scrub_days));
        }
        self.brakes.check().map_err(|e| format!("brakes.{e}"))?;
        if self.database.position.first().is_some_and(|program| !program.starts_with('/')) {
            return Err(format!("database.position = {:?}: the program must be absolute", self.database.position));
        }
        self.hooks.check()?;
        if let Some(guard) = &self.guard {
            guard.check(&self.hooks)?;
        }
        if self.link.schedule.len() > SCHEDULE_MAX {
            return Err(format!("{} [[link.schedule]] sections; it takes at most {SCHEDULE_MAX}", self.link.schedule.len()));
        }
        if let Some(address) = &self.advertise {
            coldspare_transport::invite::check_address(address).map_err(|e| format!("advertise: {e}"))?;
        }
        self.tuning().check().map_err(|e| format!("link.{e}"))
    }

    /// How fast the active may send, and when.
    pub(crate) fn schedule(&self) -> Schedule {
        Schedule::new(self.link.bandwidth, self.link.schedule.clone())
    }

    /// Where a standby listens.
    pub fn listens_at(&self) -> SocketAddr {
        self.listen.unwrap_or(SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)))
    }

    /// The link's settings as the transport takes them.
    pub fn tuning(&self) -> Tuning {
        let mut tuning = Tuning { streams: self.link.streams, congestion: self.link.congestion, ..Tuning::default() };
        tuning.idle_timeout = Duration::from_secs(self.link.idle_timeout_seconds);
        tuning.keep_alive = tuning.keep_alive.min(tuning.idle_timeout / 4);
        tuning
    }
}

impl Root {
    /// The compiled exclude list.
    ///
    /// # Errors
    /// A pattern that can't be used.
    pub fn exclude(&self) -> Result<Exclude, String> {
        let profile = match self.profile {
            Profile::None => &[][..],
            Profile::Bitbucket => BITBUCKET,
        };
        if let Some(unknown) = self.include.iter().find(|p| !profile.contains(&p.as_str())) {
            return Err(format!("include {unknown:?} is not a pattern of the profile"));
        }
        let kept = profile.iter().copied().filter(|p| !self.include.iter().any(|i| i == p));
        Exclude::new(kept.chain(self.exclude.iter().map(String::as_str))).map_err(|e| e.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "state = \"/var/lib/coldspare\"\n[[root]]\nname = \"home\"\npath = \"/srv/home\"\n";

    fn check(text: &str, expected_in_error: &str) {
        let error = Config::parse(text).expect_err("refused");
        assert!(error.contains(expected_in_error), "{error}");
    }

    #[test]
    fn a_minimal_configuration_has_all_defaults() {
        let limited = "[link]\nbandwidth = \"2 MB/s\"\n[[link.schedule]]\nfrom = \"22:00\"\nto = \"06:00\"\nweekdays = [\"fri\"]\n";
        let config = Config::parse(&format!("{BASE}{limited}")).unwrap();
        let again = Config::parse(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!((again.link.bandwidth, again.link.schedule.len()), (config.link.bandwidth, 1));
        let config = Config::parse(BASE).unwrap();
        assert_eq!(config.listens_at().port(), DEFAULT_PORT);
        assert_eq!(config.roots[0].profile, Profile::None);
        let again = Config::parse(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(again.send.full_scan_seconds, config.send.full_scan_seconds);
    }

    #[test]
    fn mistakes_name_the_place() {
        check(&format!("{BASE}profil = \"bitbucket\"\n"), "line 5");
        check(&format!("{BASE}profile = \"jira\"\n"), "line 5");
        check("state = \"x\"\n[[root]]\nname = \"home\"\npath = \"/srv/home\"\n", "absolute");
        check("state = \"/srv/home/x\"\n[[root]]\nname = \"home\"\npath = \"/srv/home\"\n", "inside root");
        check("state = \"/s\"\nroot = []\n", "[[root]]");
        check(&format!("{BASE}[[root]]\nname = \"b\"\npath = \"/srv/home/b\"\n"), "inside each other");
        check(&format!("{BASE}[[root]]\nname = \"home\"\npath = \"/srv/b\"\n"), "two roots");
        check(&format!("{BASE}exclude = [\"/abs\"]\n"), "leading");
        check(&format!("{BASE}include = [\"log/\"]\n"), "not a pattern of the profile");
        check(&format!("{BASE}[link]\nstreams = 99\n"), "streams");
        check(&format!("{BASE}[link]\nbandwidth = \"20 Mbit/s\"\n"), "line 6");
        check(&format!("{BASE}[[link.schedule]]\nfrom = \"8\"\nto = \"18:00\"\n"), "line 6");
        check(&format!("{BASE}[[link.schedule]]\nfrom = \"08:00\"\nto = \"18:00\"\nweekdays = [\"monday\"]\n"), "line 8");
        check(&format!("{BASE}[verify]\nscrub_days = 9999\n"), "scrub_days");
        check(&format!("{BASE}[brakes]\nremoved_percent = 0\n"), "removed_percent");
        check(&format!("{BASE}[brakes]\nwindow_minutes = 100000\n"), "window_minutes");
        check(&format!("{BASE}[database]\nposition = [\"psql\"]\n"), "absolute");
        check(&format!("{BASE}[guard]\nprofil = \"generic\"\n"), "line 6");
        check(&format!("{BASE}[hooks.start]\ncommand = \"/bin/true; /bin/false\"\n"), "line 6");
        check(&format!("{BASE}[hooks]\nstrat = {{ command = [] }}\n"), "line 6");
        check(&format!("advertise = \"nowhere\"\n{BASE}"), "advertise");
    }

    #[test]
    fn the_profile_can_be_changed() {
        let text = format!("{BASE}profile = \"bitbucket\"\nexclude = [\"x/\"]\ninclude = [\"log/\"]\n");
        let exclude = Config::parse(&text).unwrap().roots[0].exclude().unwrap();
        let covers = |p: &str| exclude.covers(&coldspare_core::RelPath::new(p.as_bytes()).unwrap(), coldspare_core::exclude::IsDir::Yes);
        assert!(covers("x") && covers("caches") && !covers("log"));
    }
}
