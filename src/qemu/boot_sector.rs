//! A boot sector that does what every 64-bit kernel does on its way up, and then ends QEMU.
//!
//! A hypervisor without help from the processor may run the firmware by emulating it, and give up at an instruction that its
//! emulator lacks (`kvm_pvm`: at `iret` in protected mode). So the sector goes through protected mode into long mode with
//! paging (AMD64 Architecture Programmer's Manual, volume 2, section 14.6) and returns from an interrupt in both.

use std::arch::global_asm;

/// The status with which QEMU ends when the sector came to its end.
pub(super) const STATUS: i32 = (0x10 << 1) | 1;

/// What is to be the disk's first sector.
pub(super) fn bytes() -> [u8; 512] {
    // SAFETY: the sector is below, 512 bytes in read-only memory.
    unsafe { SECTOR }
}

unsafe extern "C" {
    #[link_name = "bootcache_boot_sector"]
    static SECTOR: [u8; 512];
}

// Loaded at 0x7c00 in real mode. Selectors: 8 code of 32 bits, 16 data, 24 code of 64 bits. The tables that map the
// first 2 MiB to themselves are at 0x1000 to 0x3fff, the stack below the sector.
global_asm!(
    r#"
    .pushsection .rodata.bootcache_boot_sector, "a", @progbits
    .global bootcache_boot_sector
    .hidden bootcache_boot_sector
    .code16
bootcache_boot_sector:
    cli
    xorw  %ax, %ax
    movw  %ax, %ds
    lgdtl 0x7c00 + (97f - bootcache_boot_sector)
    movl  %cr0, %eax
    orl   $1, %eax
    movl  %eax, %cr0
    ljmpl $8, $(0x7c00 + (2f - bootcache_boot_sector))

    .code32
2:  movw  $16, %ax
    movw  %ax, %ds
    movw  %ax, %es
    movw  %ax, %ss
    movl  $0x7c00, %esp
    pushfl
    pushl $8
    pushl $(0x7c00 + (3f - bootcache_boot_sector))
    iretl
3:  cld
    movl  $0x1000, %edi
    xorl  %eax, %eax
    movl  $0xc00, %ecx
    rep stosl
    movl  $0x2003, 0x1000
    movl  $0x3003, 0x2000
    movl  $0x83, 0x3000
    movl  $0x1000, %eax
    movl  %eax, %cr3
    movl  %cr4, %eax
    orl   $0x20, %eax           # PAE
    movl  %eax, %cr4
    movl  $0xc0000080, %ecx     # EFER
    rdmsr
    orl   $0x100, %eax          # LME
    wrmsr
    movl  %cr0, %eax
    orl   $0x80000000, %eax     # PG
    movl  %eax, %cr0
    ljmpl $24, $(0x7c00 + (4f - bootcache_boot_sector))

    .code64
4:  movl  $0x7c00, %esp
    pushq $16
    pushq $0x7c00
    pushfq
    pushq $24
    pushq $(0x7c00 + (5f - bootcache_boot_sector))
    iretq
5:  movw  $0xf4, %dx            # QEMU's debug-exit device
    movb  $0x10, %al
    outb  %al, %dx
6:  hlt
    jmp   6b

    .balign 8
96: .quad 0
    .quad 0x00cf9a000000ffff
    .quad 0x00cf92000000ffff
    .quad 0x00af9a000000ffff
97: .word 97b - 96b - 1
    .long 0x7c00 + (96b - bootcache_boot_sector)
    .org  bootcache_boot_sector + 510
    .byte 0x55, 0xaa
    .code64
    .popsection
    "#,
    options(att_syntax)
);
