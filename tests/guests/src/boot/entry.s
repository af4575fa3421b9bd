# From either boot protocol to ring 3, in as few instructions as possible: where KVM emulates ring 0, each one takes
# a microsecond. So all tables that can be made by the linker are, and the rest is made later, in ring 3.

.set RING0_CODE, 0x10
.set RING3_DATA, 0x23
.set RING3_CODE, 0x2b
.set TASK, 0x30

# Present, writable, ring 3; accessed and dirty, so that no walk has to write to a table.
.set TABLE, 0x27
.set PAGE_2M, 0xe7

.section .note.pvh, "a", @note
.balign 4
    .long 4, 4, 18              # lengths of name and value; XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start_pvh

.section .text.entry, "ax", @progbits
.code32
# PVH: 32-bit mode without paging, EBX at the start info.
.global start_pvh
start_pvh:
    mov eax, offset page_map
    mov cr3, eax
    mov eax, 0x620              # PAE, SSE
    mov cr4, eax
    mov ecx, 0xc0000080         # EFER
    mov eax, 0x100              # LME
    xor edx, edx
    wrmsr
    mov eax, 0x80000033         # PG, NE, ET, MP, PE
    mov cr0, eax
    lgdt [gdt_pointer]
    .byte 0xea                  # ljmp RING0_CODE:2f
    .long 2f
    .word RING0_CODE
.code64
2:  mov edi, 1
    mov esi, ebx
    jmp 3f

# Linux boot protocol: 64-bit mode, RSI at the zero page.
.global start_linux64
start_linux64:
    mov eax, offset page_map
    mov cr3, rax
    mov eax, 0x620
    mov cr4, rax
    lgdt [gdt_pointer]
    xor edi, edi

3:  mov eax, TASK
    ltr ax
    lidt [idt_pointer]
    mov esp, offset ring0_stack
    push RING3_DATA
    push offset ring3_stack - 8
    push 0x3002                 # IOPL 3, no interrupts
    push RING3_CODE
    push offset main_ring3
    iretq

# The only ways back to ring 0.

# Stops this processor for good.
.global ring0_halt
ring0_halt:
    hlt
    jmp ring0_halt

# An exception: back to ring 3, to tell. The vector is on the stack, over an error code and the frame.
.balign 16
.global fault_stubs
fault_stubs:
.set vector, 0
.rept 32
.balign 16
    # These bring an error code of their own.
    .if vector != 8 && (vector < 10 || vector > 14) && vector != 17 && vector != 21 && vector != 29 && vector != 30
    push 0
    .endif
    push vector
    jmp fault_common
.set vector, vector + 1
.endr
.balign 16
fault_common:
    pop rdi                     # vector
    pop rsi                     # error code
    mov rdx, [rsp]              # where
    mov rcx, cr2
    mov qword ptr [rsp], offset fault_ring3
    mov qword ptr [rsp + 24], offset fault_stack - 8
    iretq

.section .data
.balign 4096
.global page_map
page_map:                       # 512 GiB each
    .quad page_pointers + TABLE
    .fill 511, 8, 0
.global page_pointers
page_pointers:                  # 1 GiB each
    .quad page_directories + TABLE
    .quad page_directories + 0x1000 + TABLE
    .quad page_directories + 0x2000 + TABLE
    .quad page_directories + 0x3000 + TABLE
    .fill 508, 8, 0
page_directories:               # 2 MiB each: the first 4 GiB, one to one
.set address, 0
.rept 2048
    .quad address + PAGE_2M
    .set address, address + 0x200000
.endr

.balign 16
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    # 0x08: 32-bit code
    .quad 0x00af9b000000ffff    # 0x10: ring 0 code
    .quad 0x00cf93000000ffff    # 0x18: ring 0 data
    .quad 0x00cff3000000ffff    # 0x20: ring 3 data
    .quad 0x00affb000000ffff    # 0x28: ring 3 code
    .word task_end - task - 1, task_0 # 0x30: the task state, two places
    .byte task_16, 0x89, 0, task_24
    .quad 0
.balign 16
.global task
task:
    .long 0
    .quad ring0_stack           # RSP0
    .fill 0x5a, 1, 0
    .word 0x68
    .fill 8192, 1, 0            # every port is allowed: not every KVM keeps the IOPL that iretq sets
    .byte 0xff
task_end:
gdt_pointer:
    .word 0x3f
    .quad gdt
.balign 16
idt_pointer:
    .word 0xfff
    .quad idt

.section .bss
.balign 16
.global idt
idt:
    .space 4096
    .space 4096
ring0_stack:
    .space 4096
fault_stack:
# Drivers with all their buffers' places are moved about on it.
    .space 262144
ring3_stack:
