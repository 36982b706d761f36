//! The hooks, by what they stand in front of. Each calls the real one with what it was given and returns what that
//! returned; what it notes, it notes around that.
//!
//! `extern "C-unwind"`: a thread may be cancelled while it reads, and that unwinds through the hook. Variadic calls
//! are declared with the most arguments that they take, which on x86-64 and AArch64 Linux is the same call.
//!
//! `lseek` needs no hook: the position of a descriptor is the kernel's, see `observe`.

/// Defines hooks, and `resolve`, which looks up what is behind them. `real` in a body is that.
macro_rules! hooks {
    ($(
        fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)? = |$real:ident| $body:expr;
    )*) => {
        #[allow(non_upper_case_globals, reason = "a symbol has its function's name")]
        mod symbols {
            $(pub(super) static $name: $crate::real::Symbol = {
                const NAME: &std::ffi::CStr =
                    match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                        Ok(name) => name,
                        Err(_) => c"",
                    };
                $crate::real::Symbol::new(NAME)
            };)*
        }

        /// Looks up what is behind the hooks of this module.
        pub(super) fn resolve() {
            $(let _ = symbols::$name.address();)*
        }

        $(
            #[doc = concat!("Stands in front of `", stringify!($name), "`.")]
            ///
            /// # Safety
            /// That of the call behind it.
            #[cfg_attr(not(test), unsafe(no_mangle))]
            pub unsafe extern "C-unwind" fn $name($($argument: $type),*) $(-> $result)? {
                let Some(address) = symbols::$name.address() else {
                    return $crate::real::Absent::absent();
                };
                // SAFETY: the library's function of this name has this signature.
                let behind = unsafe {
                    std::mem::transmute::<
                        *mut std::ffi::c_void,
                        unsafe extern "C-unwind" fn($($type),*) $(-> $result)?,
                    >(address)
                };
                #[allow(clippy::too_many_arguments, reason = "as many as the call has")]
                let $real = |$($argument: $type),*| {
                    // SAFETY: bodies pass on what the hook's caller gave, under the same contract.
                    unsafe { behind($($argument),*) }
                };
                $body
            }
        )*
    };
}

pub mod aio;
pub mod copies;
pub mod descriptors;
pub mod reads;
pub mod syscall;
pub mod unseen;
pub mod uring;

/// Looks up everything behind the hooks, so that no hook has to.
pub(crate) fn resolve() {
    aio::resolve();
    copies::resolve();
    descriptors::resolve();
    reads::resolve();
    syscall::resolve();
    unseen::resolve();
    uring::resolve();
}
